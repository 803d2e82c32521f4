"""Partition tables, as read by guests' operating systems: MBR with logical partitions, and GPT.

A guest writes the tables and may be hostile, therefore the work is bounded: no list is longer than
:data:`MOST`, and chains with cycles end. If operating systems interpret a table differently, the result
includes the partitions of each interpretation.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from virt_sse.errors import ImageFormatError

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: bytes of the disk; fewer at the end of the disk."""

SECTOR_SIZES = (512, 4096)
"""In bytes. A disk does not record its sector size: tables are read for both sizes."""

MOST = 1024
"""Maximum number of partitions. Linux supports 256 per disk (``DISK_MAX_PARTS``), Windows 128."""

_MBR_SIGNATURE = b"\x55\xaa"
_PROTECTIVE_TYPE = 0xEE
_EXTENDED_TYPES = frozenset((0x05, 0x0F, 0x85))

_GPT_SIGNATURE = b"EFI PART"
_GPT_HEADER = struct.Struct("<8s4sIII QQQQ 16s QIII")
_GPT_LARGEST_TABLE = 4 << 20
"""Linux rejects larger tables (``alloc_read_gpt_entries``)."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of a disk; offset and size in bytes.

    :ivar name: table and number, e.g. ``gpt-2``. Logical partitions count from 5, as in Linux.
    """

    name: str
    offset: int
    size: int


def partitions(read: Read, size: int) -> list[Partition]:
    """All partitions of a disk of *size* bytes, sorted by offset and truncated at the end of the disk.

    Of several partitions at the same offset, the result includes the largest.

    :raise ImageFormatError: When there are more than :data:`MOST` partitions or partition tables.
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
            raise ImageFormatError(f"the disk has more than {MOST} partitions")
    return sorted(found.values(), key=lambda partition: partition.offset)


def _listed(read: Read, size: int) -> Iterator[Partition]:
    by_gpt = [partition for sector in SECTOR_SIZES for partition in _gpt(read, size, sector)]
    yield from by_gpt
    for sector in SECTOR_SIZES:
        yield from _mbr(read, size, sector, protects=bool(by_gpt))


def _mbr(read: Read, size: int, sector: int, *, protects: bool) -> Iterator[Partition]:
    """The partitions of the MBR, logical ones included.

    :param protects: the disk has a GPT: skip protective entries, meant for systems without GPT support.
    """
    for number, entry in enumerate(_entries(read, 0), start=1):
        if protects and entry.type == _PROTECTIVE_TYPE:
            continue
        yield Partition(f"mbr-{number}", entry.start * sector, entry.sectors * sector)
        if entry.type in _EXTENDED_TYPES:
            yield from _logical(read, size, sector, entry.start)


def _logical(read: Read, size: int, sector: int, container: int) -> Iterator[Partition]:
    """The logical partitions in the extended partition at sector *container*.

    The start of a logical partition is relative to its table, the start of a further table to the container.
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
                raise ImageFormatError(f"the disk has more than {MOST} partition tables")
            seen.add(further)
            tables.append(further)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of an MBR; start and length in sectors."""

    type: int
    start: int
    sectors: int


def _entries(read: Read, offset: int) -> list[_Entry]:
    """The used entries of the MBR or extended boot record at *offset*."""
    record = read(offset, 512)
    if record[510:] != _MBR_SIGNATURE:
        return []
    fields = [struct.unpack_from("<4xB3xII", record, at) for at in range(446, 510, 16)]
    return [_Entry(kind, start, sectors) for kind, start, sectors in fields if sectors]


def _gpt(read: Read, size: int, sector: int) -> Iterator[Partition]:
    """The partitions of the primary GPT or, if damaged, of the backup GPT in the last sector."""
    for lba in (1, max(1, size // sector - 1)):
        table = _gpt_table(read, lba, sector)
        if table is not None:
            for number, (kind, first, last) in enumerate(table, start=1):
                if any(kind) and last >= first:
                    yield Partition(f"gpt-{number}", first * sector, (last - first + 1) * sector)
            return


def _gpt_table(read: Read, lba: int, sector: int) -> list[tuple[bytes, int, int]] | None:
    """Type, first and last sector of each entry; ``None`` if header (in sector *lba*) or table are damaged.

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
