"""Creation of LUKS-encrypted images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import ToolError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import SECTOR
from virt_sse.model.keys import Dek
from virt_sse.qemu import luks, qcow2, rbd_image
from virt_sse.qemu.image_file import luks_area
from virt_sse.qemu.unlocking import image_options, secrets_for
from virt_sse.system.confinement import Confinement
from virt_sse.system.files import PRIVATE_FILE, length, write_at
from virt_sse.system.rbd_names import is_rbd
from virt_sse.system.tools import run

_HEADROOM, _LARGEST = 8, 64 << 40
_FORMATTER_TRIES = 10
_KEYSLOTS, _STRIPES, _ALIGNMENT = 8, 4000, 4096
_SPURIOUS = "Unable to get accurate CPU usage"
"""QEMU measures the speed of PBKDF2, which sometimes fails in a virtual machine."""


@dataclass(frozen=True, slots=True)
class Volume:
    """Parameters of a new LUKS volume: its cipher, and the DEK that unlocks the volume."""

    cipher: Cipher
    dek: Dek


def header_length(cipher: Cipher) -> int:
    """Length in bytes of the header, keyslots included, of a volume with *cipher* made by cryptsetup or QEMU.

    LUKS1 On-Disk Format Specification 1.2.3: eight keyslots, each with the volume key in 4000 stripes.
    """
    keyslot = cipher.volume_key_bits // 8 * _STRIPES
    return luks.FIRST_KEYSLOT + _KEYSLOTS * (-(-keyslot // _ALIGNMENT) * _ALIGNMENT)


def make(path: Path, image_format: DiskFormat, size: int, volumes: Sequence[Volume]) -> None:
    """Make a new, empty, LUKS-encrypted image of *size* usable bytes at *path*, mode 0600, or in Ceph.

    After a failure, the caller removes the incomplete file. Tools get the file as a descriptor: a tool that
    briefly outlives a killed virt-sse cannot recreate a removed file.

    :param volumes: one or two LUKS volumes, innermost first.
    :raise OSError: When *path* exists or there is no room.
    :raise ImageError: When there is no room.
    :raise ToolError: When neither cryptsetup nor QEMU can make a volume.
    :raise DiskExistsError: When *path* exists in Ceph.
    """
    if is_rbd(path):
        with new_beginning(volumes) as content:
            rbd_image.make(path, content, length(content) - SECTOR + size)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        make_volumes(descriptor, image_format, size, volumes)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_beginning(volumes: Sequence[Volume]) -> Iterator[int]:
    """Make the begin of a new raw image in memory: headers and keyslots, and a sector of data.

    :param volumes: one or two LUKS volumes, innermost first.
    :raise ToolError: When a volume cannot be made.
    """
    content = os.memfd_create("beginning")
    try:
        make_volumes(content, DiskFormat.RAW, SECTOR, volumes)
        yield content
    finally:
        os.close(content)


def make_volumes(descriptor: int, image_format: DiskFormat, size: int, volumes: Sequence[Volume]) -> None:
    """As :func:`make`, in the empty file open at *descriptor*."""
    *within, outer = volumes
    if not within:
        _make_volume(descriptor, image_format, size, outer)
        return
    (inner,) = within
    content = os.memfd_create("volume")
    try:
        _make_volume(content, image_format, size, inner)
        room = _room_for(content, image_format, size)
        if image_format is DiskFormat.RAW:
            os.ftruncate(content, luks_area(content, image_format)[1])
        _make_volume(descriptor, image_format, room, outer)
        _copy_into(descriptor, image_format, content, outer.dek)
    finally:
        os.close(content)


def _room_for(content: int, image_format: DiskFormat, size: int) -> int:
    """The size of an outer volume for the inner image *content* with *size* usable bytes.

    A qcow2 volume allocates space on write, therefore its size is generous: growing the disk of a running
    guest then need not move the end of the outer volume, a change invisible to NBD clients.
    """
    if image_format is DiskFormat.RAW:
        return luks_area(content, image_format)[1] + size
    return min(qcow2.most_room(_HEADROOM * size), qcow2.most_room(_LARGEST))


def _make_volume(descriptor: int, image_format: DiskFormat, size: int, volume: Volume) -> None:
    """Make one LUKS volume in the empty file open at *descriptor*."""
    try:
        header = luks.make_header(volume.cipher, volume.dek)
    except ToolError as exc:
        _make_with_qemu(descriptor, image_format, size, volume, because=exc)
        return
    if image_format is DiskFormat.RAW:
        os.ftruncate(descriptor, len(header) + size)
        write_at(descriptor, header.rstrip(b"\0"), 0)
    else:
        run(
            ["qemu-img", "create", "-q", "-f", "qcow2", f"/proc/self/fd/{descriptor}", str(size)],
            confinement=Confinement(written=_written(size)),
            pass_fds=[descriptor],
        )
        qcow2.add_luks_header(descriptor, header)


def _make_with_qemu(
    target: int, image_format: DiskFormat, size: int, volume: Volume, *, because: ToolError
) -> None:
    """Make a LUKS volume with qemu-img, if cryptsetup lacks the cipher, e.g. serpent missing in the kernel.

    :param because: the failure of cryptsetup.
    """
    prefix = image_format.luks_option_prefix
    options = {image_format.qemu_key_secret: "dek0", f"{prefix}iter-time": "10"}
    if prefix:
        options["encrypt.format"] = "luks"
    options |= {prefix + option: value for option, value in volume.cipher.qemu.items()}
    for _ in range(_FORMATTER_TRIES):
        try:
            with secrets_for([volume.dek]) as (secrets, descriptors):
                run(
                    ["qemu-img", "create", "-q", "-f", image_format.qemu_driver, *secrets]
                    + ["-o", ",".join(f"{option}={value}" for option, value in options.items())]
                    + [f"/proc/self/fd/{target}", str(size)],
                    confinement=Confinement(written=_written(size)),
                    pass_fds=[*descriptors, target],
                )
            return
        except ToolError as exc:
            if _SPURIOUS not in str(exc):
                raise ToolError(f"cannot make a LUKS image with {volume.cipher}: {exc}; {because}") from exc
    raise ToolError(f"qemu-img failed {_FORMATTER_TRIES} times to measure this machine's speed") from because


def _written(size: int) -> int:
    """Bound for the file of an image of *size* bytes, headers and tables included."""
    return size + size // 8 + (64 << 20)


def _copy_into(target: int, image_format: DiskFormat, content: int, dek: Dek) -> None:
    """Write *content* to the beginning of the new volume *target*."""
    zero = ["--target-is-zero"] if image_format is DiskFormat.QCOW2 else []
    with secrets_for([dek]) as (secrets, descriptors):
        run(
            ["qemu-img", "convert", "-n", *zero, *secrets, "-f", "raw", "--target-image-opts"]
            + [f"/proc/self/fd/{content}", image_options(Path(f"/proc/self/fd/{target}"), image_format, 1)],
            confinement=Confinement(written=_written(os.fstat(target).st_size + os.fstat(content).st_size)),
            pass_fds=[*descriptors, content, target],
        )
