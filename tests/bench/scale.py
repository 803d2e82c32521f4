"""Cost per disk on hosts with many disks: flat from a hundred disks to ten thousand."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from hook import defined, event
from hosts import prepared_host, private_backend
from measurement import Measurement, Row, Run, Target, alternate, seconds
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import image_file

_SET = "web"
_DISKS_PER_DOMAIN = 4
_HEADER = 8 << 10
_REWRAP_SECONDS = 0.008
"""Target: the time to rewrap the DEK of a disk under the platform's key."""
_LISTING = {
    "disk-list": ("disk", "list", "-o", "json"),
    "des-rotate": ("des", "rotate", _SET, "-o", "json"),
}


def measure(bench: Run) -> Iterator[Row]:
    """Compare hosts with more and more disks. The disks have small images, all under the platform's key."""
    counts = [20, 200] if bench.quick else [100, 1_000, 10_000]
    samples = bench.amount(7, quick=3)
    roots = [_host(bench.scratch / f"scale-{count}", count) for count in counts]
    for name, command in _LISTING.items():
        took = alternate(samples, *(_command(root, command) for root in roots))
        nothing = ", nothing to do" if name == "des-rotate" else ""
        yield from _rows(name, f"{' '.join(command[:2])}{nothing}", counts, took)
    yield from _rows("poll", "poll of the agent, all disks in use", counts, _polls(roots, samples))
    yield from _rotations(roots, counts)
    yield from _prepares(bench, counts)


def _rows(name: str, what: str, counts: Sequence[int], took: Sequence[Measurement]) -> Iterator[Row]:
    """A row per host; the cost of a disk is the slope from the smallest host."""
    for count, measured in zip(counts, took, strict=True):
        details = {"us_per_disk": 1e6 * measured.value / count}
        if count > counts[0]:
            details = {"us_per_disk": 1e6 * (measured.value - took[0].value) / (count - counts[0])}
        yield Row(f"scale/{name}/{count}", f"{what}, {count} disks", measured, details=details)


def _host(root: Path, count: int) -> Path:
    """A host with so many disks in a set under the platform's key."""
    with private_backend(root) as backend:
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


def add_copies(backend: Backend, first: Disk, count: int, *, images: bool = True) -> None:
    """Add copies of a disk, each with its own id, wrapped DEK and perhaps image; in one transaction.

    The images have the LUKS header and the envelope, but no key material: nothing opens them.
    """
    (entry,) = first.deks
    provider = backend.host.plugins.key_provider(entry.wrapped.key.provider, first.identity_for(entry.slot))
    dek = provider.unwrap(entry.wrapped, context=first.context(entry.slot))
    with image_file.opened(first.path) as image:
        header, size = os.pread(image, _HEADER, 0), os.fstat(image).st_size
    copies = []
    for number in range(count):
        disk_id = uuid.uuid4()
        copy = replace(
            first,
            id=disk_id,
            name=f"{first.name}-{disk_id.hex[:8]}-{number}",
            path=first.path.with_name(f"{disk_id}.raw"),
        )
        wrapped = provider.wrap(dek, entry.wrapped.key, context=copy.context(entry.slot))
        copy = replace(copy, deks=(replace(entry, wrapped=wrapped),))
        if images:
            copy.path.write_bytes(header)
            with image_file.opened(copy.path, os.O_RDWR) as image:
                os.ftruncate(image, size)
                backend.host.freshness.seal_new(image, copy)
            backend.host.freshness.note_new(copy)
        copies.append(copy)
    _insert(backend.host.config.state_directory / "store.sqlite", first, copies)


def _insert(store: Path, first: Disk, copies: Sequence[Disk]) -> None:
    with closing(sqlite3.connect(store)) as database, database:
        database.row_factory = sqlite3.Row
        for table, column in (("disks", "id"), ("wrapped_deks", "disk_id")):
            found = database.execute(f"SELECT * FROM {table} WHERE {column} = ?", (first.id.hex,))  # noqa: S608
            row = dict(found.fetchone())
            marks = ", ".join(f":{name}" for name in row)
            values = [
                {
                    "name": copy.name,
                    "path": str(copy.path),
                    "ciphertext": copy.deks[0].wrapped.ciphertext,
                    column: copy.id.hex,
                }
                for copy in copies
            ]
            database.executemany(
                f"INSERT INTO {table} VALUES ({marks})",  # noqa: S608
                (row | {name: value for name, value in each.items() if name in row} for each in values),
            )


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
                    _running(number, disks[number : number + _DISKS_PER_DOMAIN])
                    for number in range(0, len(disks), _DISKS_PER_DOMAIN)
                ),
            )
            watch = KeyWatch(backend, poll_seconds=0.0, probe_seconds=60.0, changed=lambda: None)
            lookup = KeyStatusLookup(backend, watch)
            (measured,) = alternate(samples, lambda: _poll(lookup, watch, snapshot))  # noqa: B023
            watch.stop()
            took.append(measured)
    return took


def _poll(lookup: KeyStatusLookup, watch: KeyWatch, snapshot: InventorySnapshot) -> None:
    watch.watch(lookup.of(snapshot).probe_deks)
    while any(watch.status(key) is None for key, _ in watch.states()):
        time.sleep(0.001)


def _running(number: int, disks: Sequence[Disk]) -> RunningDomain:
    return RunningDomain(
        uuid=uuid.UUID(int=number + 1),
        run=number + 1,
        name=f"domain-{number}",
        uses=tuple(DomainDisk(disk.id, disk.deks[0].slot, disk.path, "vda") for disk in disks),
        runs=True,
        paused_for_key=False,
        usages=frozenset(),
        definition=DomainDefinition.parse("<domain/>"),
    )


def _rotations(roots: Sequence[Path], counts: Sequence[int]) -> Iterator[Row]:
    for root, count in zip(roots, counts, strict=True):
        with Backend.open(root) as backend:
            began = time.perf_counter()
            _, report = backend.keys.rotate(PLATFORM_KEY)
            took = time.perf_counter() - began
        if report.rewrapped != count:
            raise LabError(f"{report.rewrapped} of {count} disks were rewrapped: {report.failed}")
        yield Row(
            f"scale/rotate/{count}",
            f"rotate the platform's key, {count} disks",
            Measurement.median([took]),
            target=Target(seconds=count * _REWRAP_SECONDS),
            details={"us_per_disk": 1e6 * took / count},
        )


def _prepares(bench: Run, counts: Sequence[int]) -> Iterator[Row]:
    """The hook as a process, without an agent, for a domain with one disk of a host with many."""
    took = []
    with prepared_host() as (host, backend), closing(host.connect()) as connection:
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
    yield from _rows("prepare", "hook prepare, one disk, no agent", counts, took)
