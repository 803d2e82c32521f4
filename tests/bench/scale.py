"""Cost per disk on hosts with many disks: flat from a hundred disks to ten thousand.

With a store of one host in SQLite, and with a store in PostgreSQL that a hundred hosts share.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import many_hosts
from hook import defined, event
from hosts import prepared_host, private_backend
from many_disks import DISKS_PER_DOMAIN, add_copies, poll_keys, rows, running
from measurement import Measurement, Row, Run, Target, alternate, seconds
from shared_store import postgresql
from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, NewDisk
from virt_sse.model.layers import EncryptionType

_SET = "web"
_REWRAP_SECONDS = 0.008
"""Target: the time to rewrap the DEK of a disk under the platform's key."""
_LISTING = {
    "disk-list": ("disk", "list", "-o", "json"),
    "des-rotate": ("des", "rotate", _SET, "-o", "json"),
}


def measure(bench: Run) -> Iterator[Row]:
    """Compare hosts with more and more disks. The disks have small images, all under the platform's key."""
    counts = [20, 200] if bench.quick else [100, 1_000, 10_000]
    yield from _measure_store(bench, "sqlite", counts, [None for _ in counts])
    with postgresql() as server, contextlib.ExitStack() as databases:
        urls = [server.url(databases.enter_context(server.database())) for _ in (*counts, "prepare")]
        yield from _measure_store(bench, "postgresql", counts, urls)
        yield from many_hosts.measure(bench, server)


def _measure_store(
    bench: Run, store: str, counts: Sequence[int], urls: Sequence[str | None]
) -> Iterator[Row]:
    """The rows with a kind of store.

    :param urls: of the stores by number of disks, then one for a host with libvirt.
    """
    samples = bench.amount(7, quick=3)
    roots = [
        _host(bench.scratch / f"scale-{store}-{count}", count, url)
        for count, url in zip(counts, urls, strict=False)
    ]
    for name, command in _LISTING.items():
        took = alternate(samples, *(_command(root, command) for root in roots))
        nothing = ", nothing to do" if name == "des-rotate" else ""
        yield from rows(f"{store}/{name}", f"{' '.join(command[:2])}{nothing}, {store}", counts, took)
    yield from rows(
        f"{store}/poll", f"poll of the agent, all disks in use, {store}", counts, _polls(roots, samples)
    )
    yield from _rotations(store, roots, counts)
    yield from _prepares(bench, store, counts, urls[len(counts)] if len(urls) > len(counts) else None)


def _host(root: Path, count: int, store_url: str | None) -> Path:
    """A host with so many disks in a set under the platform's key."""
    with private_backend(root, store_url=store_url) as backend:
        backend.sets.create(
            _SET,
            provider=PLATFORM_KEY.provider,
            key=PLATFORM_KEY.name,
            encryption_type=EncryptionType.CUSTOMER_KEY,
        )
        first = backend.disks.create(
            NewDisk(name="disk", size=1 << 20, format=DiskFormat.RAW, encryption_set=_SET)
        )
        add_copies(backend, first, count - 1)
        if len(backend.disks.all()) != count:
            raise LabError(f"the store does not have {count} disks")
    return root


def _command(root: Path, arguments: Sequence[str]) -> Callable[[], object]:
    command = [Path(sys.executable).parent / "virt-sse", *arguments]
    environment = os.environ | {"VIRT_SSE_ROOT": str(root)}
    return lambda: subprocess.run(command, env=environment, capture_output=True, check=True)


def _polls(roots: Sequence[Path], samples: int) -> list[Measurement]:
    """Polls of the store and of the keys in use, for running domains with all disks of a host."""
    took = []
    for root in roots:
        with Backend.open(root) as backend:
            disks = backend.disks.all()
            snapshot = InventorySnapshot(
                number=1,
                domains=tuple(
                    running(number, disks[number : number + DISKS_PER_DOMAIN])
                    for number in range(0, len(disks), DISKS_PER_DOMAIN)
                ),
            )
            watch = KeyWatch(backend, poll_seconds=0.0, probe_seconds=60.0, changed=lambda: None)
            lookup = KeyStatusLookup(backend, watch)
            (measured,) = alternate(samples, lambda: poll_keys(lookup, watch, snapshot))  # noqa: B023
            watch.stop()
            took.append(measured)
    return took


def _rotations(store: str, roots: Sequence[Path], counts: Sequence[int]) -> Iterator[Row]:
    """Rotations; the last is killed in the middle and resumed.

    Each rewrap adds 1 to a disk's generation, which tells disks left out and disks rewrapped twice.
    """
    for root, count in zip(roots, counts, strict=True):
        with Backend.open(root) as backend:
            before = {disk.id: disk.generation for disk in backend.disks.all()}
        began, cpu = time.perf_counter(), _cpu_seconds()
        killed = _killed_rotation(root, count) if count == counts[-1] else 0
        with Backend.open(root) as backend:
            if killed:
                report = backend.sets.rotate(_SET)
            else:
                _, report = backend.keys.rotate(PLATFORM_KEY)
            took, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
            current = backend.host.plugins.key_provider(PLATFORM_KEY.provider).current_key(PLATFORM_KEY.name)
            wrong = [
                disk
                for disk in backend.disks.all()
                if disk.deks[0].wrapped.key != current
                or disk.generation != before[disk.id] + 1
                or backend.host.freshness.carried_by(disk.path).envelope != disk.envelope
            ]
        if wrong or report.failed or not count - killed >= report.rewrapped > 0:
            raise LabError(
                f"{killed} and {report.rewrapped} of {count} disks were rewrapped, {len(wrong)} not exactly "
                f"once: {report.failed}"
            )
        resumed = f", killed after {killed} and resumed" if killed else ""
        yield Row(
            f"scale/{store}/rotate/{count}",
            f"rotate the platform's key, {count} disks{resumed}, {store}",
            Measurement.median([took]),
            target=Target(seconds=count * _REWRAP_SECONDS),
            details={"us_per_disk": 1e6 * took / count, "cpu_us_per_disk": 1e6 * cpu / count},
        )


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _killed_rotation(root: Path, count: int) -> int:
    """Kill a rotation of *count* disks in the middle: the number of disks rewrapped until then."""
    code = f"from virt_sse.backend import Backend\nBackend.open().keys.rotate({PLATFORM_KEY!r})"
    program = f"from virt_sse.model.keys import KeyRef\n{code}"
    environment = os.environ | {"VIRT_SSE_ROOT": str(root)}
    with Backend.open(root) as backend:
        before = set(backend.host.store.keys_in_use())

        def rewrapped() -> int:
            found = backend.host.store.keys_in_use()
            return sum(deks for key, deks in found.items() if key not in before)

        with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
            try:
                while rewrapped() < count // 4 and process.poll() is None:
                    time.sleep(0.1)
            finally:
                process.kill()
        return rewrapped()


def _prepares(bench: Run, store: str, counts: Sequence[int], url: str | None) -> Iterator[Row]:
    """The hook as a process, without an agent, for a domain with one disk of a host with many."""
    took = []
    with prepared_host(store_url=url) as (host, backend), closing(host.connect()) as connection:
        xml = defined(connection, backend, "single", None)
        prepare, release = (
            event(backend.host.config.hook_path, name, xml) for name in ("prepare", "release")
        )
        first = backend.disks.create(NewDisk(name="other", size=1 << 20, format=DiskFormat.RAW))
        added = 2
        for count in counts:
            add_copies(backend, first, count - added, images=False)
            added = count
            prepare()
            samples = []
            for _ in range(bench.amount(11, quick=3)):
                samples.append(seconds(prepare))
                release()
            took.append(Measurement.median(samples))
    yield from rows(f"{store}/prepare", f"hook prepare, one disk, no agent, {store}", counts, took)
