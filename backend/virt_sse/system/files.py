"""Files and folders that only we may read, and writes that a crash cannot tear."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


def canonical(path: Path) -> Path:
    """*path* made absolute, its folder without symbolic links: one name for one place."""
    return Path(os.path.realpath(path.parent), path.name)


def private_folder(path: Path) -> Path:
    """Make the folder *path*, 0700, and the parents it lacks; tighten it if it is there and wider.

    :raise OSError: When it cannot be made.
    """
    path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(PRIVATE_FOLDER)
    return path


def sync_folder(path: Path) -> None:
    """Make the names in the folder *path* durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, content: bytes) -> None:
    """Replace *path* by *content*, 0600: temporary file, sync, rename, sync of the folder.

    :raise OSError: When there is no room or no permission; *path* is then as it was, with nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def unnamed_file(folder: Path) -> Iterator[int]:
    """A new file in *folder*, 0600, that has no name: unless it is published, nothing of it is left.

    :raise OSError: When the folder's file system has no such files (NFS, for one).
    """
    descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Give the file *source* the name *target* as well, durably.

    :param source: also ``/proc/self/fd/N``, for an unnamed file.
    :raise FileExistsError: When *target* exists; it is never replaced.
    """
    # With a folder's descriptor, though both paths are absolute: else Python does not follow the /proc link.
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
        os.fsync(folder)
    finally:
        os.close(folder)


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """pwrite(2) until all is written; it may stop short, e.g. when the disk fills up.

    :raise OSError: When it cannot be written.
    """
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what is not a hole in a file of *size* bytes."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole from here on
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end
