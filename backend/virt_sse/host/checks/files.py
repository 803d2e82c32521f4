"""Folders and file systems of state, logs and images; the clock that stamped them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_sse.host.fault import HostFault, Severity
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk
from virt_sse.system.file_systems import is_network, type_of
from virt_sse.system.permissions import loose_folder_permission

_VOLATILE = ("ramfs", "tmpfs")
_WITHOUT_OWNERS = ("exfat", "msdos", "ntfs", "ntfs3", "vfat")
_CLOCK_SECONDS = 60


def permissions(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Folders with keys, records and logs; each command sets their modes, but not those of parents."""
    config = host.config
    for folder in (config.state_directory, config.log_directory, config.stage_directory.parent):
        try:
            found = loose_folder_permission(folder)
        except FileNotFoundError:
            continue  # made by the first command to need the folder
        except OSError as exc:
            problem = f"cannot read {folder}: {exc.strerror}"
            yield HostFault("state-unreadable", "state", problem, "repair the file system")
            continue
        if found:
            yield HostFault("state-permissions", "state", found.problem, found.remedy)


def image_folders(_host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """In a folder that another user may write, a file or link can take an image's name."""
    for folder, part in _folders(disks):
        try:
            found = loose_folder_permission(folder)
        except OSError as exc:
            problem = f"cannot read {folder}: {exc.strerror}"
            yield HostFault("images-unreadable", part, problem, "mount or restore the folder")
            continue
        if found:
            yield HostFault("images-permissions", part, found.problem, found.remedy)


def file_systems(host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Folders on file systems that lose files, have no owners, or break the locks of SQLite."""
    state = host.config.state_directory
    for folder, part in ((state, "state"), *_folders(disks)):
        kind = type_of(_existing(folder).stat().st_dev)
        if kind in _VOLATILE:
            problem = f"{folder} is on {kind}: its files end with the machine"
        elif kind in _WITHOUT_OWNERS:
            problem = f"{folder} is on {kind}, which keeps no owners and modes of files"
        elif is_network(kind) and folder == state:
            problem = f"{folder} is on {kind}, where locks of SQLite may fail"
        else:
            continue
        remedy = f"move the files of {folder} to a file system such as ext4 or xfs"
        yield HostFault("file-system-unsuitable", part, problem, remedy, Severity.WARNING)


def clock(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Records of the future: the clock goes wrong now, or went wrong before."""
    now = time.time()
    for folder in (host.config.state_directory, host.config.log_directory):
        for path in folder.glob("*"):
            try:
                ahead = path.stat().st_mtime - now
            except FileNotFoundError:
                continue
            if ahead > _CLOCK_SECONDS:
                problem = f"{path} was written {ahead:.0f} s in the future"
                remedy = "set the clock (timedatectl set-ntp true): certificates and audit records need it"
                yield HostFault("clock-behind", "clock", problem, remedy)
                return


def _folders(disks: Sequence[Disk]) -> Iterator[tuple[Path, str]]:
    """The folders of the images, each with the disks in words."""
    seen: dict[Path, list[str]] = {}
    for disk in disks:
        seen.setdefault(disk.path.parent, []).append(disk.name)
    for folder, names in seen.items():
        yield folder, f"disk {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _existing(folder: Path) -> Path:
    """The folder, or the lowest of its parents that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())
