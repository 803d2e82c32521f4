"""Overwriting and removal of plaintext files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from virt_sse.errors import ImageError
from virt_sse.system import file_systems
from virt_sse.system.files import extents, sync_folder, write_at

_CHUNK = 1 << 20
_ELSEWHERE = frozenset({None, "btrfs", "zfs", "bcachefs", "f2fs", "nilfs2", "overlay"})
"""File systems known or suspected not to overwrite in place; btrfs has files without a type."""


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
        kind = file_systems.type_of(status.st_dev)
        return kind not in _ELSEWHERE and not file_systems.is_network(kind)
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
