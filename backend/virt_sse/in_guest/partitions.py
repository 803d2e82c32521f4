"""Partition tables, as a guest's operating system may read them: MBR with logical partitions, and GPT.

A guest writes these bytes and may mean harm, so the work is bounded whatever they say: no list is longer
than :data:`MOST`, and no chain is followed in circles. Where guests differ in what they make of a table, it
is read in each of these ways.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from virt_sse.errors import ImageFormatError

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: that many bytes of the disk, or fewer where it ends."""

SECTOR_SIZES = (512, 4096)
"""In bytes. What a guest's disk has is not written on it, so that a table is read for both."""

MOST = 1024
"""Partitions that are looked at. Linux takes 256 from a disk (``DISK_MAX_PARTS``), Windows 128."""

_MBR_SIGNATURE = b"\x55\xaa"
_PROTECTIVE_TYPE = 0xEE
_EXTENDED_TYPES = frozenset((0x05, 0x0F, 0x85))

_GPT_SIGNATURE = b"EFI PART"
_GPT_HEADER = struct.Struct("<8s4sIII QQQQ 16s QIII")
_GPT_LARGEST_TABLE = 4 << 20
"""Linux reads none that is larger (``alloc_read_gpt_entries``)."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of a disk, in bytes from its beginning.

    :ivar name: as in ``gpt-2``: where it is listed, and as what. Logical ones count from 5, as in Linux.
    """

    name: str
    offset: int
    size: int


def partitions(read: Read, size: int) -> list[Partition]:
    """All partitions of a disk of *size* bytes, by offset. What lies beyond the disk's end is cut off.

    Those that begin at the same place are one, the largest.

    :raise ImageFormatError: When there are more than :data:`MOST`, or more tables than that.
    """
    found: dict[int, Partition] = {}
    for partition in _listed(read, size):
        length = min(partition.size, size - partition.offset)
        if partition.offset <= 0 or length <= 0:
            continue
        known = found.get(partition.offset)
        if known is None or known.size < length:
            found[partition.offset] = Partition(partition.name, partition.offset, length)
        if len(found) > MOST:
            raise ImageFormatError(f"the guest has made more than {MOST} partitions on it")
    return sorted(found.values(), key=lambda partition: partition.offset)


def _listed(read: Read, size: int) -> Iterator[Partition]:
    by_gpt = [partition for sector in SECTOR_SIZES for partition in _gpt(read, size, sector)]
    yield from by_gpt
    for sector in SECTOR_SIZES:
        yield from _mbr(read, size, sector, protects=bool(by_gpt))


def _mbr(read: Read, size: int, sector: int, *, protects: bool) -> Iterator[Partition]:
    """The partitions of the MBR, logical ones included.

    :param protects: leave out what only keeps older systems from taking a disk with a GPT for an empty one.
    """
    for number, entry in enumerate(_entries(read, 0), start=1):
        if protects and entry.type == _PROTECTIVE_TYPE:
            continue
        yield Partition(f"mbr-{number}", entry.start * sector, entry.sectors * sector)
        if entry.type in _EXTENDED_TYPES:
            yield from _logical(read, size, sector, entry.start)


def _logical(read: Read, size: int, sector: int, container: int) -> Iterator[Partition]:
    """The logical partitions in an extended one that begins at sector *container*.

    A logical partition's start counts from the table that lists it, and a further table's from the container.
    """
    tables, seen, number = [container], {container}, 5
    while tables:
        table = tables.pop()
        for entry in _entries(read, table * sector):
            if entry.type not in _EXTENDED_TYPES:
                yield Partition(f"mbr-{number}", (table + entry.start) * sector, entry.sectors * sector)
                number += 1
                continue
            further = container + entry.start
            if further in seen or further * sector >= size:
                continue
            if len(seen) >= MOST:
                raise ImageFormatError(f"the guest has chained more than {MOST} partition tables on it")
            seen.add(further)
            tables.append(further)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of an MBR; start and length in sectors."""

    type: int
    start: int
    sectors: int


def _entries(read: Read, offset: int) -> list[_Entry]:
    """The entries in use of the MBR, or extended boot record, at *offset*."""
    record = read(offset, 512)
    if record[510:] != _MBR_SIGNATURE:
        return []
    fields = [struct.unpack_from("<4xB3xII", record, at) for at in range(446, 510, 16)]
    return [_Entry(kind, start, sectors) for kind, start, sectors in fields if sectors]


def _gpt(read: Read, size: int, sector: int) -> Iterator[Partition]:
    """The partitions of a GPT: of the primary, or if that is damaged of the backup in the last sector."""
    for lba in (1, max(1, size // sector - 1)):
        table = _gpt_table(read, lba, sector)
        if table is not None:
            for number, (kind, first, last) in enumerate(table, start=1):
                if any(kind) and last >= first:
                    yield Partition(f"gpt-{number}", first * sector, (last - first + 1) * sector)
            return


def _gpt_table(read: Read, lba: int, sector: int) -> list[tuple[bytes, int, int]] | None:
    """Type, first and last sector of each entry, if the header in sector *lba* and its table are whole.

    UEFI Specification 2.10, §5.3.2 and §5.3.3.
    """
    raw = read(lba * sector, sector)
    if len(raw) < sector or not raw.startswith(_GPT_SIGNATURE):
        return None
    fields = _GPT_HEADER.unpack_from(raw)
    header_size, header_crc, own_lba = fields[2], fields[3], fields[5]
    entries_lba, count, entry_size, entries_crc = fields[10:]
    if not _GPT_HEADER.size <= header_size <= sector or own_lba != lba:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:header_size]) != header_crc:
        return None
    if entry_size < 128 or entry_size & (entry_size - 1) or not 0 < count * entry_size <= _GPT_LARGEST_TABLE:
        return None
    entries = read(entries_lba * sector, count * entry_size)
    if len(entries) < count * entry_size or zlib.crc32(entries) != entries_crc:
        return None
    return [struct.unpack_from("<16s16xQQ", entries, at) for at in range(0, len(entries), entry_size)]
