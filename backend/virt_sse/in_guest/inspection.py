"""Detection of in-guest encryption on a whole disk, in its partitions, and in nested volumes."""

from __future__ import annotations

from collections.abc import Iterator

from virt_sse.errors import ImageFormatError
from virt_sse.in_guest.containers import volumes
from virt_sse.in_guest.partitions import Partition, Read, partitions
from virt_sse.in_guest.signatures import kinds
from virt_sse.model.content import Finding

WHOLE_DISK = "disk"

_DEPTH = 3
"""Levels of nesting: a partition with an MD array with an LVM physical volume with a logical volume."""

_MOST_READS, _MOST_BYTES = 40_000, 256 << 20
"""Limits of an inspection. A disk with 256 partitions and 256 logical volumes takes 7000 reads."""


def inspect(read: Read, size: int) -> list[Finding]:
    """The encrypted volumes on a disk of *size* bytes, sorted by offset.

    :raise ImageFormatError: When the number of partitions and volumes exceeds the limits of an inspection.
    """
    read = _Bounded(read, size)
    found = list(_within(read, Partition(WHOLE_DISK, 0, size), depth=_DEPTH))
    for partition in partitions(read, size):
        found += _within(read, partition, depth=_DEPTH)
    first = {(finding.offset, finding.kind): finding for finding in reversed(found)}
    return sorted(first.values(), key=lambda finding: (finding.offset, finding.kind.value))


def _within(read: Read, partition: Partition, *, depth: int) -> Iterator[Finding]:
    def read_within(offset: int, length: int) -> bytes:
        return read(partition.offset + offset, max(0, min(length, partition.size - offset)))

    for kind in kinds(read_within):
        yield Finding(partition.name, partition.offset, partition.size, kind)
    if depth > 1:
        for volume in volumes(read_within, partition.size):
            name = f"{partition.name}/{volume.name}"
            inner = Partition(name, partition.offset + volume.offset, volume.size)
            yield from _within(read, inner, depth=depth - 1)


class _Bounded:
    """Reads from a disk, within the limits of an inspection and up to the end of the disk."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self._reads = self._bytes = 0

    def __call__(self, offset: int, length: int) -> bytes:
        length = min(length, self._size - offset)
        if length <= 0:
            return b""
        self._reads += 1
        self._bytes += length
        if self._reads > _MOST_READS or self._bytes > _MOST_BYTES:
            raise ImageFormatError("the disk has too many partitions and volumes to inspect")
        return self._read(offset, length)
