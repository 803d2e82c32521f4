"""Stores with many disks, and the polls of an agent whose domains use the disks."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace

import sqlalchemy as sa

from measurement import Measurement, Row
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.backend import Backend
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import Disk
from virt_sse.qemu import image_file
from virt_sse.store.tables import disks, wrapped_deks

DISKS_PER_DOMAIN = 4
_HEADER = 8 << 10


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
    _insert(backend.host.config.store_url, first, copies)


def _insert(store_url: str, first: Disk, copies: Sequence[Disk]) -> None:
    """Insert rows like those of *first*."""
    engine = sa.create_engine(store_url)
    with contextlib.closing(engine.connect()) as connection, connection.begin():
        for table, column in ((disks, "id"), (wrapped_deks, "disk_id")):
            found = connection.execute(table.select().where(table.c[column] == first.id))
            row = dict(found.mappings().one())
            values = [
                {
                    "name": copy.name,
                    "path": str(copy.path),
                    "ciphertext": copy.deks[0].wrapped.ciphertext,
                    column: copy.id,
                }
                for copy in copies
            ]
            if values:
                connection.execute(
                    table.insert(),
                    [row | {name: value for name, value in each.items() if name in row} for each in values],
                )
    engine.dispose()


def rows(name: str, what: str, counts: Sequence[int], took: Sequence[Measurement]) -> Iterator[Row]:
    """A row per host; the cost of a disk is the slope from the smallest host."""
    for count, measured in zip(counts, took, strict=True):
        details = {"us_per_disk": 1e6 * measured.value / count}
        if count > counts[0]:
            details = {"us_per_disk": 1e6 * (measured.value - took[0].value) / (count - counts[0])}
        yield Row(f"scale/{name}/{count}", f"{what}, {count} disks", measured, details=details)


def poll_keys(lookup: KeyStatusLookup, watch: KeyWatch, snapshot: InventorySnapshot) -> None:
    watch.watch(lookup.of(snapshot).probe_deks)
    while any(watch.status(key) is None for key, _ in watch.states()):
        time.sleep(0.001)


def running(number: int, disks: Sequence[Disk]) -> RunningDomain:
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
