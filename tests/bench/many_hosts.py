"""Cost of one host in a store that many hosts share: flat from one host to a hundred, with 100 disks each."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

import many_disks
from hosts import joined_backend, private_backend
from measurement import Measurement, Row, Run, seconds
from virt_sse.agent.image_watch import ImageWatch
from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.agent.lease_watch import LeaseWatch
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.store.tables import lease_users, leases

if TYPE_CHECKING:
    from support.postgresql import PostgresqlServer

_DISKS = 100
"""Disks of a host, all in use."""


class SimulatedHost:
    """A host without libvirt, whose agent polls the store for running domains."""

    def __init__(self, backend: Backend, disks: Sequence[Disk]) -> None:
        self._backend = backend
        numbers = range(0, len(disks), many_disks.DISKS_PER_DOMAIN)
        self.snapshot = InventorySnapshot(
            number=1,
            domains=tuple(
                many_disks.running(
                    uuid.uuid4().int >> 1, disks[number : number + many_disks.DISKS_PER_DOMAIN]
                )
                for number in numbers
            ),
        )
        self._keys = KeyWatch(backend, poll_seconds=0.0, probe_seconds=600.0, changed=lambda: None)
        self._lookup = KeyStatusLookup(backend, self._keys)

    def take_leases(self, connection: sa.Connection) -> None:
        """Take the leases of all domains and disks, in one statement per table."""
        host = self._backend.host.leases
        host.renew()
        uses = [
            {"resource_id": resource_id, "user_id": domain.uuid, "since": 0}
            for domain in self.snapshot.domains
            for resource_id in (domain.uuid, *(use.disk_id for use in domain.uses))
        ]
        of_host = [{"resource_id": use["resource_id"], "host_id": host.identity.id} for use in uses]
        connection.execute(leases.insert(), of_host)
        connection.execute(lease_users.insert(), uses)

    def poll(self) -> None:
        """Ask for the keys of all disks, and compare the leases."""
        many_disks.poll_keys(self._lookup, self._keys, self.snapshot)
        LeaseWatch(self._backend.host.leases).keep(self.snapshot, is_current=True)
        if len(self._keys.states()) != 1:
            raise LabError(f"{len(self._keys.states())} keys were asked for instead of 1")

    def stop(self) -> None:
        """End the threads."""
        self._keys.stop()


def measure(bench: Run, server: PostgresqlServer) -> Iterator[Row]:
    """Stores of more and more hosts, one after the other."""
    for number in [1, 3] if bench.quick else [1, 10, 100]:
        folder = bench.scratch / f"hosts-{number}"
        folder.mkdir()
        with server.database() as name, contextlib.ExitStack() as opened:
            yield from _measure_hosts(bench, server, folder, server.url(name), number, opened)
        shutil.rmtree(folder)


def _measure_hosts(
    bench: Run, server: PostgresqlServer, folder: Path, url: str, number: int, opened: contextlib.ExitStack
) -> Iterator[Row]:
    count = number * _DISKS
    first = opened.enter_context(private_backend(folder / "0", store_url=url))
    template = first.disks.create(NewDisk(name="disk", size=1 << 20, format=DiskFormat.RAW))
    many_disks.add_copies(first, template, _DISKS - 1)
    ours = first.disks.all()
    many_disks.add_copies(first, template, count - _DISKS, images=False)
    own = {disk.id for disk in ours}
    disks = ours + [disk for disk in first.disks.all() if disk.id not in own]
    spare = first.disks.create(NewDisk(name="spare", size=1 << 20, format=DiskFormat.RAW))
    backends = [first]
    backends += [
        opened.enter_context(joined_backend(folder / str(index), first.host.config))
        for index in range(1, number)
    ]
    hosts = [
        SimulatedHost(backend, disks[index * _DISKS : (index + 1) * _DISKS])
        for index, backend in enumerate(backends)
    ]
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for host in hosts:
            opened.callback(host.stop)
            host.take_leases(connection)
        connection.execute(sa.text("ANALYZE"))
    engine.dispose()
    what = f"{number} hosts with {_DISKS} disks each"
    for host in hosts:
        host.poll()
    yield _row(server, f"poll/{count}", f"poll of one of {what}", hosts[0].poll, bench.amount(15, quick=3))
    rounds = bench.amount(3, quick=1)
    everyone = [host.poll for host in hosts for _ in range(rounds)]
    yield _row(
        server, f"poll-all/{count}", f"polls of {what}, in turns, one", _in_turns(everyone), len(everyone)
    )
    watch = ImageWatch(first, Metrics(), 60)
    watch._look()
    yield _row(
        server, f"look/{count}", f"look at the images, one of {what}", watch._look, bench.amount(15, quick=3)
    )

    def start() -> None:
        domain = uuid.uuid4()
        with first.host.leases.starting(domain, [spare.id], states=[DiskState.READY]):
            pass
        first.host.leases.end(domain)

    yield _row(
        server,
        f"lease/{count}",
        f"take and give back a lease, one of {what}",
        start,
        bench.amount(31, quick=5),
    )


def _in_turns(actions: Iterable[Callable[[], object]]) -> Callable[[], object]:
    remaining = iter(actions)
    return lambda: next(remaining)()


def _server_cpu(server: PostgresqlServer) -> float:
    """CPU seconds of the server and of its sessions, those that have ended included."""
    spent = sum(sum(map(int, fields[11:15])) for fields in _family(server.pid))
    return spent / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> Iterator[list[str]]:
    """The fields of /proc/PID/stat from the third on, of a process and its children (proc(5))."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(") ")[2].split()
            if pid in (int(path.parent.name), int(fields[1])):
                yield fields


def _row(server: PostgresqlServer, name: str, what: str, action: Callable[[], object], samples: int) -> Row:
    """Time an action; CPU milliseconds of this process and of the server are of one action as well."""
    ours, servers = time.process_time(), _server_cpu(server)
    took = Measurement.median([seconds(action) for _ in range(samples)])
    details = {
        "us_per_disk": 1e6 * took.value / _DISKS,
        "cpu_ms": 1e3 * (time.process_time() - ours) / samples,
        "server_cpu_ms": 1e3 * (_server_cpu(server) - servers) / samples,
    }
    return Row(f"scale/hosts/{name}", what, took, details=details)
