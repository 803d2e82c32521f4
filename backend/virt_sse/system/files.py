"""Private files and folders, and crash-safe writes."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
SHARED_FILE = 0o644
SHARED_FOLDER = 0o755
"""Modes of files and folders for all to read. Set explicitly: the umask of the caller may allow writing."""


def canonical(path: Path) -> Path:
    """*path* made absolute, with symbolic links of its folder resolved: a single name per location."""
    return Path(os.path.realpath(path.parent), path.name)


def private_folder(path: Path) -> Path:
    """Make the folder *path*, mode 0700, and missing parents; restrict the mode of an existing folder.

    :raise OSError: When the folder cannot be made.
    """
    shared_folder(path.parent)
    path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(PRIVATE_FOLDER)
    return path


def shared_folder(path: Path, mode: int = SHARED_FOLDER) -> Path:
    """Make the folder *path* and missing parents, with *mode* whatever the umask; existing folders stay.

    :raise OSError: When the folder cannot be made.
    """
    if not path.is_dir():
        if path.parent != path:
            shared_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=PRIVATE_FOLDER)  # never open to other users before the next line
            path.chmod(mode)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def sync_folder(path: Path) -> None:
    """Make the directory entries of the folder *path* durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, content: bytes, *, sync_name: bool = True) -> None:
    """Write *content* to *path*, mode 0600, atomically: temporary file, sync, rename, sync of the folder.

    :param sync_name: sync the folder; otherwise *path* may have the old content after a power loss.
    :raise OSError: When there is no room or no permission; *path* is unchanged, the temporary file removed.
    """
    write_shared(path, content, PRIVATE_FILE, sync_name=sync_name)


def write_shared(path: Path, content: bytes, mode: int = SHARED_FILE, *, sync_name: bool = True) -> None:
    """As :func:`write_private`, with *mode* whatever the umask. The file is private until complete.

    :raise OSError: As for :func:`write_private`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


@contextlib.contextmanager
def unnamed_file(folder: Path) -> Iterator[int]:
    """Open a new unnamed file in *folder*, mode 0600; the file vanishes with its descriptor unless published.

    :raise OSError: When the file system does not support ``O_TMPFILE`` (e.g. NFS).
    """
    descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Add the name *target* to the file *source*, durably.

    :param source: a path; ``/proc/self/fd/N`` for an unnamed file.
    :raise FileExistsError: When *target* exists; an existing file is never replaced.
    """
    # Python follows the link in /proc only if given a folder descriptor, although both paths are absolute.
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
        os.fsync(folder)
    finally:
        os.close(folder)


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of *content* at *offset*. A single pwrite(2) may write less, e.g. when the disk fills up.

    :raise OSError: When writing fails.
    """
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each data extent, i.e. range without holes, in a file of *size* bytes."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # a hole up to the end of the file
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end
