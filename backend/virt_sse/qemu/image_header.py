"""Validation of image headers, before virt-sse, qemu-img, libvirt or QEMU open an image.

The storage can write any header. QEMU and libvirt trust headers: QEMU opens the files and network addresses
named in a qcow2 header, and derives keys for minutes if a LUKS header asks for many iterations. libvirt gives
the named files to QEMU's user. Therefore only headers as written by virt-sse and QEMU are accepted.

Sources: QEMU ``docs/interop/qcow2.txt``, LUKS1 On-Disk Format Specification 1.2.3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from virt_sse.errors import ImageFormatError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.qemu.luks import HEADER_END, Luks1Header
from virt_sse.qemu.qcow2 import CRYPT_LUKS, RAW_EXTERNAL_DATA, Extension, Incompatible, Qcow2Header
from virt_sse.system.files import length as file_length

Read = Callable[[int, int], bytes]
"""Reads up to a number of bytes at an offset; the offset comes first."""

_LARGEST_L1_TABLE, _LARGEST_REFCOUNT_TABLE = 32 << 20, 8 << 20
"""QEMU's own limits, in bytes (``QCOW_MAX_L1_SIZE``, ``QCOW_MAX_REFTABLE_SIZE``)."""
_TABLE_ENTRY = 8
_MOST_REFCOUNT_ORDER = 6
_BITMAPS = struct.Struct(">IIQQ")
_MOST_BITMAPS, _LARGEST_BITMAP_DIRECTORY = 1000, 1 << 20
_KNOWN_EXTENSIONS = {Extension.LUKS, Extension.FEATURE_NAMES, Extension.BITMAPS}
"""Bitmaps: libvirt's checkpoints, for incremental backups, are bitmaps in the image."""

_FOREIGN = "something else than virt-sse changed the header: restore the image from a backup"
_DAMAGED = "restore the image from a backup"


def validate(descriptor: int, image_format: DiskFormat) -> tuple[int, int]:
    """Validate the header of the outermost volume of the image open at *descriptor*.

    :return: offset and length, in bytes, of the LUKS header and its keyslots within the file.
    :raise ImageFormatError: When the header is missing, damaged, or not as virt-sse writes headers.
    """
    return validate_content(_reader(descriptor), file_length(descriptor), image_format)


def validate_content(read: Read, size: int, image_format: DiskFormat) -> tuple[int, int]:
    """As :func:`validate`, for an image of *size* bytes, e.g. a LUKS volume, read by *read*."""
    if image_format is DiskFormat.RAW:
        return _luks(read, size, 0, None)
    header = Qcow2Header.parse(read)
    _check_references(header)
    _check_features(header)
    _check_tables(header, size)
    if header.luks is None:
        raise ImageFormatError("a qcow2 image without a LUKS header")
    offset, length = header.luks
    if offset % header.cluster_size or not offset:
        raise _refused("a LUKS header at an unexpected offset")
    return _luks(read, size, offset, length)


def locate(descriptor: int, image_format: DiskFormat) -> tuple[int, int]:
    """The LUKS header and its keyslots, as :func:`validate` returns them, also of an image that is refused.

    For our own reading and erasing of the LUKS header only. The location is within the file.

    :raise ImageFormatError: When the LUKS header is missing or damaged.
    """
    read, size = _reader(descriptor), file_length(descriptor)
    if image_format is DiskFormat.RAW:
        return _luks(read, size, 0, None)
    area = Qcow2Header.parse(read).luks
    if area is None:
        raise ImageFormatError("a qcow2 image without a LUKS header")
    offset, _ = area  # the length comes from the LUKS header, whatever the qcow2 header says
    return _luks(read, size, offset, None)


def _reader(descriptor: int) -> Read:
    return lambda offset, length: os.pread(descriptor, length, offset)


def _luks(read: Read, size: int, offset: int, length: int | None) -> tuple[int, int]:
    """Validate the LUKS header at *offset*.

    :param length: length of header and keyslots according to the qcow2 header.
    """
    if offset + HEADER_END > size:
        raise _refused("a LUKS header outside of the file")
    try:
        header = Luks1Header.parse(read(offset, HEADER_END))
    except ImageFormatError as exc:
        raise _refused(str(exc)) from exc
    if offset + header.payload_offset > size:
        if length is None:
            raise ImageFormatError("a LUKS image without data after its header")
        raise _refused("LUKS keyslots outside of the file")
    if length is not None and length != header.payload_offset:
        raise _refused("a LUKS area whose length differs from the LUKS header's")
    return offset, header.payload_offset


def _check_references(header: Qcow2Header) -> None:
    """Refuse names of other files: QEMU would open them, and libvirt would give them to QEMU's user."""
    extensions = [kind for kind, _ in header.extensions]
    backing = header.backing_file_offset or header.backing_file_size
    if backing or Extension.BACKING_FORMAT in extensions:
        raise _refused("a qcow2 image that names a backing file")
    if (
        header.incompatible_features & Incompatible.DATA_FILE
        or header.autoclear_features & RAW_EXTERNAL_DATA
        or Extension.DATA_FILE in extensions
    ):
        raise _refused("a qcow2 image that names an external data file")
    if header.snapshots or header.snapshots_offset:
        raise _refused("a qcow2 image with internal snapshots")


def _check_features(header: Qcow2Header) -> None:
    features = header.incompatible_features
    if features & Incompatible.CORRUPT:
        raise ImageFormatError("a qcow2 image that QEMU has marked as corrupt", hint=_DAMAGED)
    if features & Incompatible.DIRTY:
        raise ImageFormatError("a qcow2 image that is marked as not closed cleanly", hint=_DAMAGED)
    if features:
        raise _refused(f"a qcow2 image with the incompatible features {features:#x}")
    extensions = [kind for kind, _ in header.extensions]
    unknown = [kind for kind in extensions if kind not in _KNOWN_EXTENSIONS]
    if unknown:
        raise _refused(f"a qcow2 image with the unknown header extension {unknown[0]:#x}")
    if len(set(extensions)) != len(extensions):
        raise _refused("a qcow2 image with a repeated header extension")
    if header.crypt_method != CRYPT_LUKS:
        raise ImageFormatError("a qcow2 image without a LUKS header")


def _check_tables(header: Qcow2Header, size: int) -> None:
    cluster = header.cluster_size
    l1_table, refcounts = header.l1_entries * _TABLE_ENTRY, header.refcount_table_clusters * cluster
    reach = header.l1_entries * cluster * (cluster // _TABLE_ENTRY)
    if l1_table > _LARGEST_L1_TABLE or not _within(header.l1_table_offset, l1_table, cluster, size):
        raise _refused("a qcow2 image with an L1 table that is too large or outside of the file")
    if (
        not refcounts
        or refcounts > _LARGEST_REFCOUNT_TABLE
        or not _within(header.refcount_table_offset, refcounts, cluster, size)
        or header.refcount_order > _MOST_REFCOUNT_ORDER
    ):
        raise _refused("a qcow2 image with a refcount table that is too large or outside of the file")
    bitmaps = dict(header.extensions).get(Extension.BITMAPS)
    if bitmaps is not None and not _is_bitmaps(bitmaps, cluster, size):
        raise _refused("a qcow2 image with too many bitmaps, or bitmaps outside of the file")
    if header.size > reach or header.size % 512:
        raise _refused(f"a qcow2 image with an invalid size, {header.size} bytes")


def _is_bitmaps(body: bytes, cluster: int, size: int) -> bool:
    """Whether *body* is a valid bitmaps extension; QEMU itself limits each bitmap."""
    if len(body) != _BITMAPS.size:
        return False
    count, _, length, offset = _BITMAPS.unpack(body)
    is_small = 0 < count <= _MOST_BITMAPS and 0 < length <= _LARGEST_BITMAP_DIRECTORY
    return is_small and _within(offset, length, cluster, size)


def _within(offset: int, length: int, cluster: int, size: int) -> bool:
    """Whether a table is in clusters of its own, after the header's cluster, and within the file."""
    return bool(offset) and offset % cluster == 0 and offset + length <= size


def _refused(reason: str) -> ImageFormatError:
    return ImageFormatError(reason, hint=_FOREIGN)
