"""Faults of a host's set-up, with a remedy each: write permission of other users, the libvirt hook."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.config import Config
from virt_sse.host.setup import hook_parameters
from virt_sse.keys.host import Host
from virt_sse.libvirt import hook_script
from virt_sse.model.disks import Disk
from virt_sse.system.permissions import loose_folder_permission, loose_permission


@dataclass(frozen=True, slots=True)
class SetupFault:
    """A fault of the set-up.

    :ivar part: the faulty part of the host: ``disk NAME``, ``state``, ``hook``, ``library``.
    :ivar remedy: a command, or advice.
    """

    part: str
    problem: str
    remedy: str


def examine(host: Host) -> list[SetupFault]:
    """Find the faults of a host; changes nothing, and opens no image.

    :raise StoreError: When the store cannot be read.
    """
    config = host.config
    return [*_state(config), *_hook(config), *_guest_library(config), *_images(host.store.all())]


def _state(config: Config) -> Iterator[SetupFault]:
    """Folders with keys, records and logs; each command sets their modes, but not those of parents."""
    for folder in (config.state_directory, config.log_directory, config.stage_directory.parent):
        try:
            found = loose_folder_permission(folder)
        except FileNotFoundError:
            continue  # made by the first command to need the folder
        except OSError as exc:
            yield SetupFault("state", f"cannot read {folder}: {exc.strerror}", "repair the file system")
            continue
        if found:
            yield SetupFault("state", found.problem, found.remedy)


def _hook(config: Config) -> Iterator[SetupFault]:
    """Without the hook, libvirt starts no domain with our disks."""
    path, remedy = config.hook_path, "virt-sse host init, then restart libvirtd (or virtqemud)"
    try:
        is_current = path.read_text() == hook_script.script(*hook_parameters(config))
    except FileNotFoundError:
        yield SetupFault("hook", f"the libvirt hook {path} is missing", remedy)
        return
    except (OSError, UnicodeDecodeError) as exc:
        yield SetupFault("hook", f"cannot read the libvirt hook {path}: {exc}", remedy)
        return
    if not is_current:
        yield SetupFault("hook", f"the libvirt hook {path} is not this version's", remedy)
    elif not os.access(path, os.X_OK):
        yield SetupFault("hook", f"the libvirt hook {path} is not executable", remedy)
    elif found := loose_permission(path, path.stat()) or loose_folder_permission(path.parent):
        yield SetupFault("hook", found.problem, found.remedy)


def _guest_library(config: Config) -> Iterator[SetupFault]:
    """Without the library, accelerated domains are slower; with a changed library, they do not start."""
    library, remedy = config.guest_library, "virt-sse host init --accelerate"
    if not library.is_wanted:
        return
    if reason := library.obstacle():
        yield SetupFault("library", reason, remedy)
    elif library.is_outdated:
        yield SetupFault("library", f"{library.path} is not this version's library", remedy)


def _images(disks: list[Disk]) -> Iterator[SetupFault]:
    """In a folder that another user may write, a file or link can take an image's name."""
    seen: dict[Path, list[str]] = {}
    for disk in disks:
        seen.setdefault(disk.path.parent, []).append(disk.name)
    for folder, names in seen.items():
        part = f"disk {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        try:
            found = loose_folder_permission(folder)
        except OSError as exc:
            yield SetupFault(part, f"cannot read {folder}: {exc.strerror}", "mount or restore the folder")
            continue
        if found:
            yield SetupFault(part, found.problem, found.remedy)
