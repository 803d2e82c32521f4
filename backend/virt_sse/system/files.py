"""Private files and folders, and crash-safe writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from virt_sse.system.rbd_names import is_rbd

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
SHARED_FILE = 0o644
SHARED_FOLDER = 0o755
"""Modes of files and folders for all to read. Set explicitly: the umask of the caller may allow writing."""


def canonical(path: Path) -> Path:
    """*path* made absolute, with symbolic links of its folder resolved: a single name per location.

    The name of an RBD image is one already.
    """
    if is_rbd(path):
        return path
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


def write_private(path: Path, content: bytes) -> None:
    """Write *content* to *path*, mode 0600, atomically: temporary file, sync, rename, sync of the folder.

    The temporary file of a killed process is removed when *path* is written next.

    :raise OSError: When there is no room or no permission; *path* is unchanged, the temporary file removed.
    """
    write_shared(path, content, PRIVATE_FILE)


def single_writer_temporary(path: Path) -> Path:
    """The temporary file of :func:`write_as_single_writer`."""
    return path.with_name(f".{path.name}.new")


def write_as_single_writer(path: Path, content: bytes) -> None:
    """Write *content* to *path*, mode 0600, atomically; the caller excludes all other writers of *path*.

    The temporary file has a fixed name: the next write replaces the file of a killed process, without a look
    at the folder, which may have many files. After a power loss *path* may have the old content.

    :raise OSError: When there is no room or no permission; *path* is unchanged, the temporary file removed.
    """
    temporary = single_writer_temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, PRIVATE_FILE)
    try:
        os.fchmod(descriptor, PRIVATE_FILE)
        _write_through(descriptor, content)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def write_shared(path: Path, content: bytes, mode: int = SHARED_FILE) -> None:
    """As :func:`write_private`, with *mode* whatever the umask. The file is private until complete.

    :raise OSError: As for :func:`write_private`.
    """
    _remove_abandoned(path)
    temporary, descriptor = _new_temporary(path)
    with os.fdopen(descriptor, "wb") as file:  # open, and so locked, until the file has its name
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """Write *content* to the new file *path*, mode 0600, durably; a killed process leaves no part.

    :raise FileExistsError: When *path* exists; an existing file is never replaced.
    :raise OSError: When there is no room or no permission; no file is left.
    """
    with complete_file(path) as descriptor:
        write_at(descriptor, content, 0)


def _write_through(descriptor: int, content: bytes) -> None:
    write_at(descriptor, content, 0)
    os.fsync(descriptor)


_SUFFIX_BYTES = 8
_SUFFIX = re.compile(f"[0-9a-f]{{{2 * _SUFFIX_BYTES}}}")


def _new_temporary(path: Path) -> tuple[Path, int]:
    """Make a temporary file beside *path*, locked while its descriptor is open.

    The lock tells other processes that the file is being written, and ends with this process.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(_SUFFIX_BYTES)}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            is_ours = _locked(descriptor) and os.fstat(descriptor).st_nlink
        except OSError:  # without locks, no process removes the files of others
            is_ours = True
        if is_ours:
            return temporary, descriptor
        os.close(descriptor)  # another process took the file, not locked yet, for an abandoned one
        temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for *path* left behind by killed processes; they may hold secrets."""
    prefix = f".{path.name}."
    for abandoned in path.parent.iterdir():
        if abandoned.name.startswith(prefix) and _SUFFIX.fullmatch(abandoned.name, len(prefix)):
            with contextlib.suppress(OSError):
                descriptor = os.open(abandoned, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    if _locked(descriptor):
                        abandoned.unlink()
                finally:
                    os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock a file, if no other process has it locked: whether this process has the lock.

    :raise OSError: When the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[int]:
    """Open the new file *path*, mode 0600, which gets its name, durably, when the block succeeds.

    Until then, the file has no name, and vanishes with a killed process. A file system without ``O_TMPFILE``,
    e.g. NFS, has a temporary file beside *path*, removed after an error; after a kill, by the next call for
    *path*.

    :raise FileExistsError: When *path* exists; an existing file is never replaced.
    :raise OSError: When there is no room or no permission; no file is left.
    """
    try:
        unnamed = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    else:
        try:
            yield unnamed
            os.fsync(unnamed)
            publish(Path(f"/proc/self/fd/{unnamed}"), path)
        finally:
            os.close(unnamed)
        return
    _remove_abandoned(path)
    temporary, named = _new_temporary(path)
    try:
        yield named
        os.fsync(named)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(named)


def publish(source: Path, target: Path) -> None:
    """Add the name *target* to the file *source*, durably.

    :param source: a path; ``/proc/self/fd/N`` for an unnamed file.
    :raise FileExistsError: When *target* exists; an existing file is never replaced.
    :raise OSError: When the file system has no hard links and *source* has no name.
    """
    # Python follows the link in /proc only if given a folder descriptor, although both paths are absolute.
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            os.link(source, target.name, dst_dir_fd=folder, follow_symlinks=True)
        except OSError as exc:
            if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            _rename_without_links(source, target)  # e.g. on FAT, or by FUSE
        os.fsync(folder)
    finally:
        os.close(folder)


def _rename_without_links(source: Path, target: Path) -> None:
    """Rename a file to a free name: an empty file reserves the name."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
    try:
        source.rename(target)
    except BaseException:
        target.unlink()
        raise


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of *content* at *offset*. A single pwrite(2) may write less, e.g. when the disk fills up.

    :raise OSError: When writing fails.
    """
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def length(descriptor: int) -> int:
    """Length in bytes of an open file or block device."""
    return os.lseek(descriptor, 0, os.SEEK_END)


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
