"""Which disk a copy was made of, also after another disk has taken the place of that disk."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import SERIAL_LENGTH, Disk


def owners(disks: Iterable[Disk]) -> dict[UUID, Disk]:
    """By copy, the disk that the copy was made of, if any is left.

    A disk that was re-encrypted, or restored in place, has taken the place of a disk with another id, and has
    kept its serial number.

    :param disks: all disks and copies of a host.
    """
    known = list(disks)
    present = {each.id: each for each in known}
    by_serial = {each.guest_serial: each for each in known if each.kind is DiskKind.DISK}
    found: dict[UUID, Disk] = {}
    for copy in known:
        if copy.kind is DiskKind.DISK or copy.source_id is None:
            continue
        source = present.get(copy.source_id)
        if source is None:
            former = (copy.source_id, copy.origin_id or copy.source_id)
            serials = (by_serial.get(each.hex[:SERIAL_LENGTH]) for each in former)
            source = next((disk for disk in serials if disk), None)
        if source is not None and source.kind is DiskKind.DISK:
            found[copy.id] = source
    return found
