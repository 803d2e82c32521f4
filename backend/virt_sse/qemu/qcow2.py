"""qcow2 files: location of the LUKS header, and insertion of a LUKS header.

Source: QEMU ``docs/interop/qcow2.txt``. qemu-img makes the image, of any size and with its own defaults. This
module writes only the LUKS part, because qemu-img takes seconds for a LUKS header and sometimes fails.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import ImageFormatError
from virt_sse.system.files import write_at

MAGIC = b"QFI\xfb"

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_END = 0
_LUKS_POINTER = struct.Struct(">QQ")
CRYPT_LUKS = 2
_REFCOUNT_ORDER_16_BIT = 4
_FARTHEST = 1 << 62
"""Offsets beyond do not fit into system calls."""


class Extension(enum.IntEnum):
    """Types of header extensions."""

    LUKS = 0x0537BE77
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    BACKING_FORMAT = 0xE2792ACA
    DATA_FILE = 0x44415441


class Incompatible(enum.IntFlag):
    """Incompatible features."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4


RAW_EXTERNAL_DATA = 2
"""An autoclear feature."""


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The relevant fields of a qcow2 version 3 header, not validated; sizes and offsets in bytes.

    :ivar extensions: types and contents of the header extensions, in order.
    :ivar extensions_end: offset of the end marker of the header extensions.
    :ivar luks: offset and length of the LUKS header, or ``None``.
    """

    cluster_size: int
    size: int
    crypt_method: int
    backing_file_offset: int
    backing_file_size: int
    l1_entries: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible_features: int
    autoclear_features: int
    refcount_order: int
    header_length: int
    extensions: tuple[tuple[int, bytes], ...]
    extensions_end: int
    luks: tuple[int, int] | None

    @classmethod
    def read(cls, descriptor: int) -> Self:
        """Read the header of the open image *descriptor*.

        :raise ImageFormatError: When the image is damaged or not qcow2 version 3.
        """
        return cls.parse(lambda offset, length: os.pread(descriptor, length, offset))

    @classmethod
    def parse(cls, read: Callable[[int, int], bytes]) -> Self:
        """Read the header of an image by *read*, a function of offset and length.

        :raise ImageFormatError: When the image is damaged or not qcow2 version 3.
        """
        start = read(0, _HEADER.size + _VERSION_3.size)
        if len(start) < _HEADER.size + _VERSION_3.size or not start.startswith(MAGIC):
            raise ImageFormatError("not a qcow2 image")
        fields = _HEADER.unpack_from(start)
        version, cluster_bits = fields[1], fields[4]
        incompatible, _, autoclear, refcount_order, header_length = _VERSION_3.unpack_from(
            start, _HEADER.size
        )
        if (
            version != 3
            or not 9 <= cluster_bits <= 21
            or not len(start) <= header_length <= 1 << cluster_bits
        ):
            raise ImageFormatError("not a qcow2 image of version 3, or a damaged one")
        extensions, extensions_end, luks = _extensions(read(0, 1 << cluster_bits), header_length)
        return cls(
            cluster_size=1 << cluster_bits,
            size=fields[5],
            crypt_method=fields[6],
            backing_file_offset=fields[2],
            backing_file_size=fields[3],
            l1_entries=fields[7],
            l1_table_offset=fields[8],
            refcount_table_offset=fields[9],
            refcount_table_clusters=fields[10],
            snapshots=fields[11],
            snapshots_offset=fields[12],
            incompatible_features=incompatible,
            autoclear_features=autoclear,
            refcount_order=refcount_order,
            header_length=header_length,
            extensions=extensions,
            extensions_end=extensions_end,
            luks=luks if fields[6] == CRYPT_LUKS else None,
        )


def _extensions(
    cluster: bytes, position: int
) -> tuple[tuple[tuple[int, bytes], ...], int, tuple[int, int] | None]:
    """The header extensions, the offset of their end marker, and the pointer to the LUKS header."""
    luks = None
    found: list[tuple[int, bytes]] = []
    while position + _EXTENSION.size <= len(cluster):
        kind, length = _EXTENSION.unpack_from(cluster, position)
        if kind == _END:
            return tuple(found), position, luks
        body = position + _EXTENSION.size
        found.append((kind, cluster[body : body + length]))
        if kind == Extension.LUKS and length == _LUKS_POINTER.size and body + length <= len(cluster):
            luks = _LUKS_POINTER.unpack_from(cluster, body)
            if luks[0] > _FARTHEST:
                raise ImageFormatError("a qcow2 image with a LUKS header outside of the file")
        position = body + (length + 7) // 8 * 8
    raise ImageFormatError("a qcow2 image with damaged header extensions")


def most_room(size: int) -> int:
    """Upper bound for the file size of an image of *size* usable bytes; metadata takes less than 0.1 %."""
    return size + size // 256 // 512 * 512 + (64 << 20)


def full_room(size: int) -> int:
    """Upper bound for the file size of an image of *size* usable bytes, all written, without snapshots."""
    return size + size // 256 + (4 << 20)


def add_luks_header(descriptor: int, luks: bytes) -> None:
    """Make the new, empty qcow2 image open at *descriptor* LUKS-encrypted, with the LUKS header *luks*.

    As with ``qemu-img create -o encrypt.format=luks``, the LUKS header goes into new clusters at the end of
    the file, their reference counts into the first refcount block, the pointer into a header extension.

    :raise ImageFormatError: When the image is not new and empty.
    """
    header = Qcow2Header.read(descriptor)
    cluster = header.cluster_size
    offset = -(-os.fstat(descriptor).st_size // cluster) * cluster
    clusters = -(-len(luks) // cluster)
    first = offset // cluster
    per_block = cluster // 2
    if header.crypt_method or header.refcount_order != _REFCOUNT_ORDER_16_BIT or first + clusters > per_block:
        raise ImageFormatError("only a fresh qcow2 image can be given a LUKS header")

    os.ftruncate(descriptor, offset + clusters * cluster)
    write_at(descriptor, luks.rstrip(b"\0"), offset)

    (refcount_block,) = struct.unpack(">Q", os.pread(descriptor, 8, header.refcount_table_offset))
    if not refcount_block:
        raise ImageFormatError("only a fresh qcow2 image can be given a LUKS header")
    write_at(descriptor, struct.pack(">H", 1) * clusters, refcount_block + 2 * first)

    # The new extension replaces the end marker; the end marker and the backing file's name follow.
    tail = b"\0" * _EXTENSION.size
    start = bytearray(os.pread(descriptor, header.extensions_end, 0))
    start += (
        _EXTENSION.pack(Extension.LUKS, _LUKS_POINTER.size) + _LUKS_POINTER.pack(offset, len(luks)) + tail
    )
    if header.backing_file_offset:
        name = os.pread(descriptor, header.backing_file_size, header.backing_file_offset)
        struct.pack_into(">Q", start, 8, len(start))
        start += name
    if len(start) > cluster:
        raise ImageFormatError("no room for a LUKS header extension")
    struct.pack_into(">I", start, 32, CRYPT_LUKS)
    write_at(descriptor, bytes(start), 0)
