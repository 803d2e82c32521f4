"""Types of file systems (proc_pid_mountinfo(5))."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    {"9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "virtiofs"}
)


def type_of(device: int) -> str | None:
    """The type of the mounted file system with the device number *device*.

    :return: ``None`` if no mount has the number, as for files in btrfs.
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, IndexError):
        for line in _MOUNTS.read_text("utf-8", errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return None


def is_network(kind: str | None) -> bool:
    """Whether a file system of this type may be served by another machine, or by a program (FUSE)."""
    return kind is not None and (kind in _NETWORK or kind.partition(".")[0] == "fuse")


def is_on_network(descriptor: int) -> bool:
    """Whether an open file is in a file system of :func:`is_network`; those have no block device."""
    device = os.fstat(descriptor).st_dev
    return os.major(device) == 0 and is_network(type_of(device))
