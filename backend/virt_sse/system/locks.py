"""One lock per disk, gone with the process that held it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from virt_sse.errors import DiskInUseError, StoreError
from virt_sse.system.files import PRIVATE_FILE, private_folder

_FLOCK = struct.Struct("hhqqi4x")
"""``struct flock`` of 64-bit Linux."""


def is_locked(descriptor: int, start: int, length: int) -> bool:
    """Whether anyone else holds a lock on a byte of the open file's range."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


def holder(descriptor: int) -> int | None:
    """The process that holds a POSIX lock on the open file, by its id in our PID namespace.

    0 when it has none there; ``None`` when none holds one.
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(pid)


class DiskLocks:
    """Locks bytes of one file, a byte per disk: no lock file is left behind, also after kill -9.

    Open-file-description locks (fcntl(2)) exclude threads of one process as well as other processes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(self, disk_id: UUID, *, wait: bool = False) -> Iterator[None]:
        """Keep every other command away from the disk.

        :param wait: for one that is at work on it, rather than to refuse.
        :raise DiskInUseError: When another command is at work on it.
        :raise StoreError: When the file of locks cannot be made.
        """
        try:
            private_folder(self._path.parent)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        except OSError as exc:
            raise StoreError(f"cannot open {self._path}: {exc.strerror}") from exc
        try:
            byte = disk_id.int & ((1 << 62) - 1)
            try:
                fcntl.fcntl(
                    descriptor,
                    fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK,
                    _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0),
                )
            except BlockingIOError as exc:
                raise DiskInUseError(f"another command is at work on disk {disk_id}") from exc
            yield
        finally:
            os.close(descriptor)
