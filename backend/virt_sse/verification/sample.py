"""Whether what a host cache holds looks like ciphertext.

It is below the guest's LUKS node, and so can hold nothing else; that is seen from how QEMU and the cache are
joined. This looks at the content all the same, as a cache joined in another way would betray itself: a sector
of plaintext is hardly ever as even as ciphertext. Compressed data is, and is not told from it.
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
"""How many are looked at, spread evenly over what there is."""

_EVEN = 480.0
"""Pearson's statistic over byte values, 255 degrees of freedom: ciphertext hardly ever exceeds it."""
_WORDS = struct.Struct(">64Q")
_COUNTS = struct.Struct(">256H")
_ENTRY_RESERVED = 0x3F000000000001FE
"""QEMU ``docs/interop/qcow2.txt``: bits of L1 and L2 entries that are zero in all of them."""
_MOST_REFERENCES = 255
_HEADER = 4096
"""A LUKS1 or qcow2 header's own fields, as far as they are not ciphertext."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen, in sectors.

    :ivar ciphertext: those as even as ciphertext.
    :ivar format: those of headers and tables of the image's format.
    :ivar other: those that are neither, and may be plaintext.
    """

    ciphertext: int
    format: int
    other: int


def look_at(descriptor: int, headers: Collection[int], *, has_tables: bool) -> Sample:
    """Look at sectors of the open file, holes and zeroes left out.

    :param headers: where headers of the image's format begin, in bytes.
    :param has_tables: whether the format, qcow2, has tables among the data.
    :raise OSError: When it cannot be read.
    """
    ciphertext = tables = other = 0
    size = os.fstat(descriptor).st_size
    for offset in _chosen(list(extents(descriptor, size))):
        sector = os.pread(descriptor, SECTOR, offset)
        if len(sector) < SECTOR or not any(sector):
            continue
        if is_even(sector):
            ciphertext += 1
        elif any(start <= offset < start + _HEADER for start in headers) or (
            has_tables and is_table(sector, size)
        ):
            tables += 1
        else:
            other += 1
    return Sample(ciphertext, tables, other)


def is_even(sector: bytes) -> bool:
    """Whether all byte values are about as frequent in it."""
    expected = len(sector) / 256
    counts = Counter(sector)
    statistic = sum((counts.get(value, 0) - expected) ** 2 for value in range(256)) / expected
    return statistic < _EVEN


def is_table(sector: bytes, size: int) -> bool:
    """Whether it may be part of a qcow2 table: of offsets within a file of *size* bytes, or of counts."""
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
