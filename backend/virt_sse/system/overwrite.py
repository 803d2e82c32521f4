"""Overwriting and removal of plaintext files."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from virt_sse.errors import ImageError
from virt_sse.system.files import extents, sync_folder, write_at

_CHUNK = 1 << 20
_MOUNTS = Path("/proc/self/mountinfo")
_ELSEWHERE = frozenset({"btrfs", "zfs", "bcachefs", "f2fs", "nilfs2", "overlay", "nfs", "nfs4", "cifs", "9p"})
"""File systems known or suspected not to overwrite in place."""


def overwrite_and_remove(path: Path, identity: tuple[int, int]) -> bool:
    """Overwrite the file at *path* with random bytes, durably, and remove the file. Ignores a missing file.

    The old content may survive unseen on copy-on-write storage (also by snapshots and reflinks) and on flash
    memory.

    :param identity: device and inode of the file: any other file of the same name is left alone.
    :return: whether the file system overwrites in place.
    :raise ImageError: When *path* is a different file, or cannot be overwritten.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError as exc:
        raise ImageError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != identity:
            raise ImageError(f"{path} is a different file than before: not overwritten")
        _overwrite(descriptor, status.st_size)
        path.unlink()
        sync_folder(path.parent)
        return _file_system(status.st_dev) not in _ELSEWHERE
    except OSError as exc:
        raise ImageError(f"cannot overwrite {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def _overwrite(descriptor: int, size: int) -> None:
    """Overwrite the data of the file; holes stay holes."""
    for begin, end in extents(descriptor, size):
        for offset in range(begin, end, _CHUNK):
            write_at(descriptor, os.urandom(min(_CHUNK, end - offset)), offset)
    os.fsync(descriptor)


def _file_system(device: int) -> str:
    """The type of the file system with the device number (proc_pid_mountinfo(5))."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, IndexError):
        for line in _MOUNTS.read_text("utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return "btrfs"  # the device numbers of btrfs files are in no mount
