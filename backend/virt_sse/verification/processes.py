"""Evidence from the kernel: open files and sockets of processes (proc(5))."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_LISTENS = 0x10000
"""Linux ``SO_ACCEPTCON`` in the flags of ``/proc/net/unix``."""
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file of a process.

    :ivar name: the name according to the kernel; the former name of a deleted file.
    :ivar is_unnamed: whether the file was deleted, or never had a name.
    :ivar identity: as of :func:`identity`; different for a file that has replaced the open file.
    """

    descriptor: int
    name: str
    is_unnamed: bool
    identity: tuple[int, int]


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file presently at *path*, if any; of a block device, the device's number.

    Each guest has nodes of its own for a device.
    """
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0  # no inode has this number
    return status.st_dev, status.st_ino


def open_files(pid: int) -> list[OpenFile]:
    """The open regular files, devices and sockets of a process; empty if the process has ended."""
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted((_PROC / str(pid) / "fd").iterdir(), key=lambda each: int(each.name)):
            with contextlib.suppress(OSError):
                name = os.readlink(entry)  # noqa: PTH115 -- a Path would normalise "socket:[1]"
                status = entry.stat()
                is_unnamed = name.endswith(_DELETED)
                found.append(
                    OpenFile(
                        descriptor=int(entry.name),
                        name=name.removesuffix(_DELETED),
                        is_unnamed=is_unnamed,
                        identity=_identity(status),
                    )
                )
    return found


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has the file presently at *path* open, rather than a former file of the same name."""
    wanted = identity(path)
    return wanted is not None and any(file.identity == wanted for file in open_files(pid))


def listens_at(pid: int, path: Path) -> bool:
    """Whether a process holds the listening socket at *path*, made in our network namespace."""
    inodes = set()
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self/net/unix").read_text("utf-8", errors="replace").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and int(fields[3], 16) & _LISTENS and fields[7] == str(path):
                inodes.add(f"socket:[{fields[6]}]")
    return any(file.name in inodes for file in open_files(pid))
