"""Users, besides root and the caller, who may change a file or folder, or read a file."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

_GROUP_OR_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_GROUP_OR_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True, slots=True)
class LoosePermission:
    """A file or folder that another user may change or read.

    :ivar problem: in words, with the path.
    :ivar remedy: the command that takes the permission away.
    """

    problem: str
    remedy: str


def loose_permission(path: Path, status: os.stat_result) -> LoosePermission | None:
    """A permission for others to write the file or folder at *path*; ``None`` if they may not.

    POSIX ACLs that grant writing show in the group's permissions (acl(5)).
    """
    if status.st_uid not in (0, os.geteuid()):
        return LoosePermission(f"{path} belongs to user {status.st_uid}", f"chown root {path}")
    if status.st_mode & _GROUP_OR_OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        return LoosePermission(f"other users may write {path} (mode {mode:04o})", f"chmod go-w {path}")
    return None


def readable_permission(path: Path, status: os.stat_result) -> LoosePermission | None:
    """A permission for others to read the file at *path*; ``None`` if they may not."""
    if status.st_mode & _GROUP_OR_OTHERS_READ:
        mode = stat.S_IMODE(status.st_mode)
        return LoosePermission(f"other users may read {path} (mode {mode:04o})", f"chmod go-r {path}")
    return None


def loose_folder_permission(folder: Path) -> LoosePermission | None:
    """A permission for other users to add, replace or rename files in *folder*, also by its parents.

    In a parent with the sticky bit, such as ``/tmp``, other users cannot rename the folders of root.

    :raise OSError: When a folder cannot be read.
    """
    folder = folder.resolve()
    for each in (folder, *folder.parents):
        status = each.stat()
        if each != folder and status.st_mode & stat.S_ISVTX and status.st_uid == 0:
            continue
        if found := loose_permission(each, status):
            return found
    return None
