"""Classifies sectors of a host cache by byte entropy: ciphertext, metadata or possible plaintext.

A cache below the guest's LUKS node can hold ciphertext only; the block graph shows the cache's position. The
content is checked too, because a cache in a wrong position holds plaintext, whose byte values are rarely as
evenly distributed as ciphertext's. Compressed data cannot be told from ciphertext.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from virt_sse.system.files import extents

SECTOR = 512
SECTORS = 512
"""Number of sectors in a sample, evenly spread over the file's data."""

_EVEN = 480.0
"""Pearson's statistic over byte values, 255 degrees of freedom: ciphertext hardly ever exceeds it."""
_WORDS = struct.Struct(">64Q")
_COUNTS = struct.Struct(">256H")
_ENTRY_RESERVED = 0x3F000000000001FE
"""QEMU ``docs/interop/qcow2.txt``: bits that are zero in all L1 and L2 entries."""
_MOST_REFERENCES = 255
_BLOCK = 16
"""Bytes of a cipher's block."""
_HEADER = 4096
"""Bytes of a LUKS1 or qcow2 header that hold fields, not ciphertext."""


@dataclass(frozen=True, slots=True)
class SectorSample:
    """Number of sectors of a sample by content.

    :ivar ciphertext: byte values as evenly distributed as ciphertext's.
    :ivar format: headers and tables of the image's format.
    :ivar other: neither: possibly plaintext.
    """

    ciphertext: int
    format: int
    other: int


def sample_sectors(
    descriptor: int, headers: Collection[int], *, has_tables: bool, has_holes: bool = False
) -> SectorSample:
    """Sample sectors of the open file, without holes and zeroes.

    :param headers: offsets, in bytes, at which headers of the image's format begin.
    :param has_tables: whether the format, qcow2, has tables among the data.
    :param has_holes: whether the file may hold decrypted holes of a sparse image (:func:`is_decrypted_hole`);
        these are left out, like zeroes.
    :raise OSError: When the file cannot be read.
    """
    ciphertext = tables = other = 0
    size = os.fstat(descriptor).st_size
    for offset in _chosen(list(extents(descriptor, size))):
        sector = os.pread(descriptor, SECTOR, offset)
        if len(sector) < SECTOR or not any(sector) or (has_holes and is_decrypted_hole(sector)):
            continue
        if is_even(sector):
            ciphertext += 1
        elif any(start <= offset < start + _HEADER for start in headers) or (
            has_tables and is_table(sector, size)
        ):
            tables += 1
        else:
            other += 1
    return SectorSample(ciphertext, tables, other)


def is_even(sector: bytes) -> bool:
    """Whether all byte values are about equally frequent in *sector*."""
    expected = len(sector) / 256
    counts = Counter(sector)
    statistic = sum((counts.get(value, 0) - expected) ** 2 for value in range(256)) / expected
    return statistic < _EVEN


def is_decrypted_hole(sector: bytes) -> bool:
    """Whether *sector* may be zeroes that AES-CBC has decrypted: all blocks but the first are the same."""
    return sector[_BLOCK:-_BLOCK] == sector[2 * _BLOCK :]


def is_table(sector: bytes, size: int) -> bool:
    """Whether *sector* may belong to a qcow2 table: offsets within a file of *size* bytes, or refcounts."""
    offsets = _WORDS.unpack(sector)
    if all(not entry & _ENTRY_RESERVED and (entry & 0x00FFFFFFFFFFFE00) <= size for entry in offsets):
        return True
    return all(count <= _MOST_REFERENCES for count in _COUNTS.unpack(sector))


def _chosen(filled: list[tuple[int, int]]) -> Iterator[int]:
    """The offsets of at most :data:`SECTORS` sectors, evenly spread."""
    total = sum((end - begin) // SECTOR for begin, end in filled)
    step = max(1, -(-total // SECTORS))
    skipped = 0
    for begin, end in filled:
        count = (end - begin) // SECTOR
        for number in range(-skipped % step, count, step):
            yield begin + number * SECTOR
        skipped += count
