"""Images on block devices, e.g. LVM volumes: a LUKS header, keyslots, and the rest of the device.

The size of such a disk follows from the device's. The first 4 KiB, with the LUKS header and the sealed
envelope, are written last and at once: a killed creation leaves no header, and no key on the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from virt_sse.errors import ImageError, InvalidValueError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disks import SECTOR
from virt_sse.qemu import luks
from virt_sse.qemu.formatting import header_length
from virt_sse.system.block_devices import unused
from virt_sse.system.confinement import BoundFile, Confinement
from virt_sse.system.files import length, write_at
from virt_sse.system.tools import run


def room_on(path: Path, ciphers: Sequence[Cipher]) -> int:
    """Usable bytes of a disk over a whole block device that is not in use and holds no data.

    :param ciphers: of the disk's volumes.
    :raise DiskInUseError: When the device is mounted, part of another device, or in use by QEMU.
    :raise ImageError: When the device cannot be opened, has a signature, or is too small.
    """
    with unused(path) as descriptor:
        _refuse_signed(path, descriptor)
        return _room(path, descriptor, ciphers)


def refuse_other_size(path: Path, size: int, ciphers: Sequence[Cipher]) -> None:
    """Refuse a size other than that of a disk over the whole block device.

    :param size: wanted, in bytes.
    :param ciphers: of the disk's volumes.
    :raise InvalidValueError: When the disk on the device has another size.
    :raise ImageError: When the device cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise ImageError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        room = _room(path, descriptor, ciphers)
    finally:
        os.close(descriptor)
    if size != room:
        raise InvalidValueError(
            f"the disk on {path} has {room} bytes, not {size}: it takes the whole block device",
            hint="change the size of the device first, e.g. with lvextend",
        )


def write_beginning(content: int, path: Path) -> None:
    """Write a complete begin of an image, of :func:`.formatting.new_beginning`, to a block device.

    :raise DiskInUseError: When the device is in use by now.
    :raise ImageError: When the device holds data by now.
    :raise OSError: When the device cannot be written.
    """
    end = length(content) - SECTOR
    with unused(path) as descriptor:
        _refuse_signed(path, descriptor)
        begin = luks.FIRST_KEYSLOT
        write_at(descriptor, os.pread(content, end - begin, begin), begin)
        os.fsync(descriptor)
        write_at(descriptor, os.pread(content, begin, 0), 0)
        os.fsync(descriptor)


def _room(path: Path, descriptor: int, ciphers: Sequence[Cipher]) -> int:
    room = length(descriptor) - sum(map(header_length, ciphers))
    if room < SECTOR:
        raise ImageError(f"{path} is too small for a disk")
    return room


def _refuse_signed(path: Path, descriptor: int) -> None:
    """Refuse a block device with the signature of a file system, partition table, LUKS or LVM volume."""
    said = run(
        ["wipefs", "--noheadings", "--output", "TYPE", str(path)],
        confinement=Confinement(files=[BoundFile(path, descriptor)]),
    )
    if found := sorted(set(said.split())):
        raise ImageError(
            f"{path} holds data: {', '.join(found)}",
            hint=f"if nobody needs the data, run 'wipefs --all {path}' first",
        )
