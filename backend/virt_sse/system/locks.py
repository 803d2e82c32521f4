"""Locks per disk, released by the kernel when their process ends."""

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
    """Whether a different open file description holds a lock on any byte of the range of the open file."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


@contextlib.contextmanager
def held_byte(descriptor: int, byte: int) -> Iterator[bool]:
    """Lock a byte of a file, open for writing, during the block; whether no other open file has it locked."""

    def lock(kind: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    try:
        lock(fcntl.F_WRLCK)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        lock(fcntl.F_UNLCK)


def lock_shared(descriptor: int, byte: int) -> None:
    """Lock a byte of an open file as long as the descriptor is open; others may lock it likewise."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def holder(descriptor: int) -> int | None:
    """The id, in our PID namespace, of a process with a POSIX lock on the open file.

    0 for a process outside of the namespace; ``None`` when the file is not locked.
    """
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(pid)


class DiskLocks:
    """Locks bytes of a single file, a byte per disk: no stale lock files, even after kill -9.

    Open-file-description locks (fcntl(2)) exclude threads of the same process as well as other processes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(self, disk_id: UUID, *, wait: bool = False) -> Iterator[None]:
        """Exclude all other commands from the disk during the block.

        :param wait: wait for a command that holds the lock, instead of raising.
        :raise DiskInUseError: When another command holds the lock.
        :raise StoreError: When the lock file cannot be opened.
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
