"""Volumes within a partition, as found by Linux: LVM's logical volumes and the content of MD RAID members.

The work is bounded, because a guest wrote the bytes and may be hostile; see
:mod:`virt_sse.in_guest.partitions`.
"""

from __future__ import annotations

import re
import struct

from virt_sse.errors import ImageFormatError
from virt_sse.in_guest.partitions import MOST, Partition, Read

_SECTOR = 512

_LVM_LABEL, _LVM_TYPE = b"LABELONE", b"LVM2 001"
_LVM_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_LVM_MOST_TEXT = 1 << 20
"""Default size of LVM's metadata area."""
_LVM_AREA_HEADER = 512
_LVM_EXTENT_SIZE = re.compile(rb"extent_size = (\d{1,10})\b")
_LVM_FIRST_EXTENT = re.compile(rb"pe_start = (\d{1,16})\b")
_LVM_STRIPE = re.compile(rb'"([^"\n]{1,128})", (\d{1,10})\b')
_LVM_ID_GROUPS = (6, 4, 4, 4, 4, 4, 6)

_MD_MAGIC = 0xA92B4EFC
_MD_SUPERBLOCKS = (0, 4096)
"""Offsets in versions 1.1 and 1.2. Versions 0.90 and 1.0 have the superblock at the end."""


def volumes(read: Read, size: int) -> list[Partition]:
    """The volumes in a partition of *size* bytes, named ``lvm`` or ``md``; offsets count from its beginning.

    Each segment of a logical volume is listed as a volume; only the first segment can have a signature.

    :raise ImageFormatError: When there are more than :data:`MOST` volumes.
    """
    found = {offset: name for name, offset in (*_lvm(read), *_md(read)) if 0 < offset < size}
    return [Partition(name, offset, size - offset) for offset, name in sorted(found.items())]


def _lvm(read: Read) -> list[tuple[str, int]]:
    """Parse LVM2 (``lib/format_text/layout.h``): label, physical volume header, metadata area, text."""
    start = read(0, 4 * _SECTOR)
    for at in range(0, len(start), _SECTOR):
        label = start[at : at + _SECTOR]
        if len(label) == _SECTOR and label.startswith(_LVM_LABEL) and label[24:32] == _LVM_TYPE:
            identifier, areas = _lvm_header(label)
            for area in areas:
                if text := _lvm_text(read, *area):
                    return [("lvm", offset) for offset in _lvm_pieces(text, identifier)]
    return []


def _lvm_header(label: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """The id of a physical volume, and offset and size of each metadata area (the header's second list)."""
    (at,) = struct.unpack_from("<I", label, 20)
    identifier = label[at : at + 32]
    lists: list[list[tuple[int, int]]] = [[], []]
    at += 40
    for entries in lists:
        while at + 16 <= len(label):
            offset, size = struct.unpack_from("<QQ", label, at)
            at += 16
            if not offset:
                break
            entries.append((offset, size))
    return identifier, lists[1]


def _lvm_text(read: Read, area: int, size: int) -> bytes:
    """The current metadata text in the area at *area*: a ring buffer after a header."""
    header = read(area, _LVM_AREA_HEADER)
    if len(header) < _LVM_AREA_HEADER or header[4:20] != _LVM_AREA_MAGIC:
        return b""
    offset, length = struct.unpack_from("<QQ", header, 40)
    if not _LVM_AREA_HEADER <= offset < size or length > min(size, _LVM_MOST_TEXT):
        return b""
    text = read(area + offset, min(length, size - offset))
    return text + read(area + _LVM_AREA_HEADER, length - len(text)) if len(text) < length else text


def _lvm_pieces(text: bytes, identifier: bytes) -> set[int]:
    """Offsets in bytes of all segments of logical volumes on the physical volume with the id *identifier*."""
    groups, at = [], 0
    for length in _LVM_ID_GROUPS:
        groups.append(identifier[at : at + length])
        at += length
    listed = text.find(b'id = "' + b"-".join(groups) + b'"')
    if listed < 0:
        return set()
    name = text[max(0, listed - 256) : listed].rpartition(b"{")[0].split()[-1:]
    extent_size = _LVM_EXTENT_SIZE.search(text)
    first_extent = _LVM_FIRST_EXTENT.search(text, listed)
    if not name or not extent_size or not first_extent:
        return set()
    pieces = set()
    for stripe in _LVM_STRIPE.finditer(text):
        if stripe[1] == name[0]:
            pieces.add((int(first_extent[1]) + int(stripe[2]) * int(extent_size[1])) * _SECTOR)
            if len(pieces) > MOST:
                raise ImageFormatError(f"the disk has more than {MOST} logical volumes")
    return pieces


def _md(read: Read) -> list[tuple[str, int]]:
    """Parse MD superblocks (Linux, ``struct mdp_superblock_1``)."""
    found = []
    for at in _MD_SUPERBLOCKS:
        superblock = read(at, 256)
        if len(superblock) == 256 and struct.unpack_from("<II", superblock) == (_MD_MAGIC, 1):
            (data_offset,) = struct.unpack_from("<Q", superblock, 128)
            found.append(("md", data_offset * _SECTOR))
    return found
