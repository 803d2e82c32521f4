"""Block devices, e.g. LVM volumes: their use by the kernel, and by QEMU and its programs."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from virt_sse.errors import DiskInUseError, ImageError

_QEMU = ("qemu", "nbdkit")
"""Beginnings of the names of processes that serve images."""

DEVICES = Path("/dev")


def is_device(path: Path) -> bool:
    """Whether an image at *path* is a block device: by a name in ``/dev``, where root alone makes names.

    Elsewhere, a link to a device is no image: whoever may write to a folder of images could make one.
    """
    return path.is_relative_to(DEVICES) and path.is_block_device()


def qemu_users(device: int) -> list[int]:
    """The ids of QEMU's processes, and of NBD servers, that have a block device open.

    :param device: number of the device (``st_rdev``).
    """
    return [int(folder.name) for folder in Path("/proc").iterdir() if _has_open(folder, device)]


def _has_open(process: Path, device: int) -> bool:
    if not process.name.isdigit():
        return False
    with contextlib.suppress(OSError):  # the process has ended
        if (process / "comm").read_text(errors="replace").startswith(_QEMU):
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if entry.stat().st_rdev == device:
                        return True
    return False


@contextlib.contextmanager
def unused(path: Path) -> Iterator[int]:
    """Open a block device for writing, for this process alone: the kernel then refuses to mount it.

    :raise DiskInUseError: When the device is mounted, part of another device, or in use by QEMU.
    :raise ImageError: When *path* cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise DiskInUseError(
                f"{path} is in use: mounted, swapped to, or part of another device",
                hint=f"see 'lsblk {path}'",
            ) from exc
        raise ImageError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        if qemu_users(os.fstat(descriptor).st_rdev):
            raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process")
        yield descriptor
    finally:
        os.close(descriptor)
