"""Images as files, block devices and RBD images: opened, in use by QEMU, measured by their headers, erased.

Of an RBD image, :func:`opened` gives a file in memory with the LUKS header; :func:`sync` writes changes back.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from virt_sse.errors import DiskInUseError, ImageError, ImageFormatError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.qemu import ceph, image_header, luks, qcow2, rbd_image
from virt_sse.system.block_devices import is_device, qemu_users
from virt_sse.system.file_systems import is_on_network
from virt_sse.system.files import length as file_length
from virt_sse.system.files import publish as publish_file
from virt_sse.system.files import write_at
from virt_sse.system.locks import held_byte, is_locked, lock_shared
from virt_sse.system.rbd_names import RbdName, is_rbd

_QEMU_LOCKS, _QEMU_LOCKS_LENGTH = 100, 200
_QEMU_WRITES, _QEMU_WRITES_LENGTH = 101, 3
"""``BLK_PERM_WRITE``, ``BLK_PERM_WRITE_UNCHANGED`` and ``BLK_PERM_RESIZE`` among these."""

_FOR_GUEST, _OPENER = 300, 301
"""Bytes beyond those that QEMU locks (``RAW_LOCK_SHARED_BASE``); see the functions that lock them."""

_ERASED_AT_MOST = 4 << 20
"""Upper bound for a LUKS header with its keyslots, and so for the bytes to overwrite."""

_ERASED_AT_ONCE = 1 << 20

_rbd_headers: dict[int, rbd_image.Header] = {}
"""The open headers of RBD images, by descriptor."""


def refuse_if_open(path: Path) -> None:
    """Check that no QEMU process has the image open, not even for reading.

    QEMU locks bytes of an image (``RAW_LOCK_PERM_BASE`` in its ``block/file-posix.c``). QEMU's own tools are
    more permissive: they accept readers, and writers of raw LUKS images, whose driver shares them.

    :raise DiskInUseError: When a QEMU process has the image open.
    :raise ImageError: When the image is missing or cannot be read.
    """
    if is_rbd(path):
        if rbd_image.is_open(path):
            raise DiskInUseError(
                f"{path} is in use by a running domain or another client of Ceph",
                hint=f"'rbd status {RbdName.of(path)}' lists the clients; a dead one is forgotten after 30 s",
            )
        return
    with opened(path) as descriptor:
        refuse_if_locked(path, descriptor)


def is_open(path: Path) -> bool:
    """Whether a QEMU process has the image open, on this host or on one with which the file system has locks.

    :raise ImageError: When the image is missing or cannot be read.
    """
    if is_rbd(path):
        return rbd_image.is_open(path)
    with opened(path) as descriptor:
        is_held = is_locked(descriptor, _FOR_GUEST, 1)
        return is_held or is_locked(descriptor, _QEMU_LOCKS, _QEMU_LOCKS_LENGTH)


def refuse_if_written(path: Path) -> None:
    """Check that no QEMU process may write to the image; readers are accepted.

    :raise DiskInUseError: When a QEMU process has the image open for writing or resizing.
    :raise ImageError: When the image is missing or cannot be read.
    """
    if is_rbd(path):
        refuse_if_open(path)
        return
    with opened(path) as descriptor:
        if _is_device(descriptor):
            refuse_if_locked(path, descriptor)
        elif is_locked(descriptor, _QEMU_WRITES, _QEMU_WRITES_LENGTH) or is_locked(descriptor, _FOR_GUEST, 1):
            raise DiskInUseError(f"{path} is being written by a QEMU process")


def refuse_if_locked(path: Path, descriptor: int) -> None:
    """As :func:`refuse_if_open`, for an open file or block device.

    A lock on a block device belongs to the device's node, and libvirt gives each guest nodes of its own.
    """
    if _is_used(descriptor) or is_locked(descriptor, _FOR_GUEST, 1):
        raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process")


@contextlib.contextmanager
def sole_opener(path: Path, descriptor: int) -> Iterator[None]:
    """Open an image in a QEMU process during the block, while no other QEMU process has the image open.

    Between the check and QEMU's own lock, no other caller opens the image, here or on another host: QEMU's
    driver for raw LUKS would let both write.

    :param descriptor: of the image, open for writing.
    :raise DiskInUseError: When another QEMU process has the image open, or is about to.
    """
    if is_rbd(path):
        refuse_if_open(path)
        yield
        return
    with held_byte(descriptor, _OPENER) as is_held:
        if not is_held:
            raise DiskInUseError(f"another host is about to open {path}")
        if _is_used(descriptor):
            raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process")
        yield


def lock_for_guest(descriptor: int) -> None:
    """Have an image count as in use as long as the descriptor is open, for a guest that migrates."""
    lock_shared(descriptor, _FOR_GUEST)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open the image *path*; an ``OSError`` of the block becomes an :class:`ImageError`.

    An :class:`ImageFormatError` of the block gets the path.

    :raise ImageError: When *path* is missing, neither file nor block device, or cannot be opened.
    :raise CephError: When the cluster of an RBD image does not answer.
    """
    if is_rbd(path):
        with _errors_named(path), rbd_image.opened(path) as header:
            _rbd_headers[header.descriptor] = header
            try:
                yield header.descriptor
            finally:
                del _rbd_headers[header.descriptor]
        return
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
    except FileNotFoundError as exc:
        raise ImageError(f"image {path} is missing") from exc
    except OSError as exc:
        raise ImageError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        with _errors_named(path):
            if not (stat.S_ISREG(os.fstat(descriptor).st_mode) or _is_named_device(path, descriptor)):
                raise ImageError(f"{path} is not a regular file or a block device in /dev")
            if is_on_network(descriptor):
                # Another host may have written since, and FUSE does not always drop old pages.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ImageFormatError as exc:
        if str(path) in str(exc):
            raise
        raise ImageFormatError(f"{path}: {exc}", hint=exc.hint) from exc
    except OSError as exc:
        raise ImageError(f"cannot read or write {path}: {exc.strerror}") from exc


def sync(descriptor: int) -> None:
    """Make what was written to an image of :func:`opened` durable, in an RBD image too.

    :raise OSError: When that fails.
    :raise ImageError: When an RBD image cannot be written.
    """
    if header := _rbd_headers.get(descriptor):
        header.write_back()
    else:
        os.fdatasync(descriptor)  # the content, and where it lies; times of the file may be lost


def exists(path: Path) -> bool:
    """Whether there is a file, a link or an RBD image of that name.

    :raise CephError: When the cluster of an RBD image does not answer.
    """
    return rbd_image.exists(path) if is_rbd(path) else os.path.lexists(path)


def publish(source: Path, target: Path) -> None:
    """Give the complete image *source* the name *target* beside it, durably.

    :raise OSError: When that fails; :exc:`FileExistsError` when the name is taken.
    :raise DiskExistsError: When the name of an RBD image is taken.
    """
    if is_rbd(target):
        rbd_image.rename(source, target)
    else:
        publish_file(source, target)


def remove(path: Path) -> None:
    """Remove an image; a missing image is not an error.

    :raise OSError: When that fails.
    :raise CephError: When an RBD image cannot be removed.
    """
    if is_rbd(path):
        rbd_image.remove(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold a foreign image from check to use: another file that takes its name is not read.

    Refuses files on which qemu-img would block or never end, e.g. FIFOs and character devices.

    :return: an ``O_PATH`` descriptor, which opens no device.
    :raise ImageError: When *path* is missing, or neither a file nor a block device.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"{path} is neither a file nor a block device in /dev")
        yield descriptor
    finally:
        os.close(descriptor)


def probe_format(descriptor: int) -> DiskFormat:
    """Detect the format of the encrypted image open at *descriptor*.

    :raise ImageFormatError: When the image is neither qcow2 nor raw LUKS.
    """
    start = os.pread(descriptor, luks.HEADER_END, 0)
    if start.startswith(qcow2.MAGIC):
        return DiskFormat.QCOW2
    luks.Luks1Header.parse(start)
    return DiskFormat.RAW


def is_plain_copy(descriptor: int, size: int) -> bool:
    """Whether the open file is like an unencrypted copy of a disk: qcow2, or raw with the disk's size.

    :param size: of the disk, in bytes.
    """
    start = os.pread(descriptor, luks.HEADER_END, 0)
    if start.startswith(luks.MAGIC):
        return False
    if start.startswith(qcow2.MAGIC):
        return qcow2.Qcow2Header.read(descriptor).crypt_method == 0
    status = os.fstat(descriptor)
    return status.st_size == size and status.st_blocks > 0


def luks_area(descriptor: int, image_format: DiskFormat) -> tuple[int, int]:
    """Offset and length, in bytes, of the LUKS header and its keyslots within the file; validates the header.

    :raise ImageFormatError: When the header is missing, damaged or refused (:mod:`.image_header`).
    """
    return image_header.validate(descriptor, image_format)


def usable_size(descriptor: int, image_format: DiskFormat) -> int:
    """The usable size of the outermost volume, in bytes, computed from header and file size.

    :raise ImageFormatError: When the image is damaged or not in *image_format*.
    """
    _, header_length = luks_area(descriptor, image_format)
    if image_format is DiskFormat.QCOW2:
        return qcow2.Qcow2Header.read(descriptor).size
    size = file_length(descriptor) - header_length
    if size <= 0:
        raise ImageFormatError("a LUKS image without data after its header")
    return size


def erase(path: Path, image_format: DiskFormat) -> None:
    """Crypto-erase an image: overwrite the keyslots, and then the LUKS header with the envelope, durably.

    At most 4 MiB within the file are overwritten, whatever length the image's header names. If the header is
    damaged, these are the first 4 MiB of the file.

    :raise ImageError: When the file cannot be written.
    """
    with opened(path, os.O_RDWR) as descriptor:
        try:
            offset, length = image_header.locate(descriptor, image_format)
        except ImageFormatError:
            offset, length = 0, _ERASED_AT_MOST
        end = min(offset + min(length, _ERASED_AT_MOST), file_length(descriptor))
        keyslots = min(offset + luks.FIRST_KEYSLOT, end)
        for begin in range(keyslots, end, _ERASED_AT_ONCE):
            write_at(descriptor, os.urandom(min(_ERASED_AT_ONCE, end - begin)), begin)
        sync(descriptor)
        write_at(descriptor, os.urandom(keyslots - offset), offset)
        sync(descriptor)


def file_node(path: Path, number: int = 0) -> dict[str, object]:
    """QEMU's description of the bytes of an image.

    :param number: of the secret object of :mod:`.ceph` for an RBD image.
    """
    if is_rbd(path):
        return ceph.node(RbdName.of(path), number)
    return {"driver": file_driver(path), "filename": str(path)}


def file_driver(place: int | Path) -> str:
    """QEMU's driver for a file or block device, given by path or open descriptor."""
    is_block = _is_device(place) if isinstance(place, int) else place.is_block_device()
    return "host_device" if is_block else "file"


def _is_used(descriptor: int) -> bool:
    """Whether a QEMU process has the open image open as well."""
    if _is_device(descriptor):
        return bool(qemu_users(os.fstat(descriptor).st_rdev))
    return is_locked(descriptor, _QEMU_LOCKS, _QEMU_LOCKS_LENGTH)


def _is_named_device(path: Path, descriptor: int) -> bool:
    """Whether an image is a block device, by a name of :func:`is_device` or an open descriptor."""
    return _is_device(descriptor) and (is_device(path) or path.is_relative_to("/proc"))


def _is_device(descriptor: int) -> bool:
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)
