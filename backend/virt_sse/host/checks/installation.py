"""What ``virt-sse host init`` and ``virt-sse agent units`` install: hook, library, AppArmor rule, units."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_sse.config import Config
from virt_sse.host import setup
from virt_sse.host.fault import HostFault, Severity
from virt_sse.keys.host import Host
from virt_sse.libvirt import hook_script
from virt_sse.model.disks import Disk
from virt_sse.system.permissions import loose_folder_permission, loose_permission

_UNIT_FOLDERS = ("etc/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system")
_AGENT_UNITS = ("virt-sse-agent.socket", "virt-sse-agent.service")


def hook(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without the hook, libvirt starts no domain with our disks."""
    config = host.config
    path, remedy = config.hook_path, "virt-sse host init, then restart libvirtd (or virtqemud)"
    try:
        is_current = path.read_text() == hook_script.script(*setup.hook_parameters(config))
    except FileNotFoundError:
        yield HostFault("hook-missing", "hook", f"the libvirt hook {path} is missing", remedy)
        return
    except (OSError, UnicodeDecodeError) as exc:
        yield HostFault("hook-unreadable", "hook", f"cannot read the libvirt hook {path}: {exc}", remedy)
        return
    if not is_current:
        yield HostFault("hook-outdated", "hook", f"the libvirt hook {path} is not this version's", remedy)
    elif not os.access(path, os.X_OK):
        yield HostFault("hook-not-executable", "hook", f"the libvirt hook {path} is not executable", remedy)
    elif found := loose_permission(path, path.stat()) or loose_folder_permission(path.parent):
        yield HostFault("hook-permissions", "hook", found.problem, found.remedy)
    elif _is_unseen(config):
        problem = (
            "the hook was installed after the start of libvirtd, which looks for hooks only at its start"
        )
        yield HostFault("hook-unseen", "hook", problem, "systemctl restart libvirtd (or virtqemud)")


def _is_unseen(config: Config) -> bool:
    """Whether libvirtd is older than each qemu hook: libvirtd looks for hooks only when it starts."""
    with contextlib.suppress(FileNotFoundError):
        began = libvirtd_pid_file(config).stat().st_mtime
        hooks = config.hook_path.parent.parent
        others = [
            hooks / "qemu",
            *(each for each in config.hook_path.parent.iterdir() if each != config.hook_path),
        ]
        installed = setup.hook_marker(config).stat().st_mtime
        return installed > began and not any(
            each.exists() and each.stat().st_mtime < began for each in others
        )
    return False


def libvirtd_pid_file(config: Config) -> Path:
    """The pid file of libvirt's QEMU driver, in libvirtd or virtqemud, written when the daemon starts."""
    return config.root / "run/libvirt/qemu/driver.pid"


def guest_library(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without the library, accelerated domains are slower; with a changed library, they do not start."""
    library, remedy = host.config.guest_library, "virt-sse host init --accelerate"
    if not library.is_wanted:
        return
    if reason := library.obstacle():
        yield HostFault("library-unusable", "library", reason, remedy)
    elif library.is_outdated:
        problem = f"{library.path} is not this version's library"
        yield HostFault("library-outdated", "library", problem, remedy)


def apparmor_rule(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without the rule, AppArmor keeps QEMU from the sockets of stages."""
    config = host.config
    local = config.root / setup.APPARMOR_LOCAL
    if not (config.root / setup.APPARMOR_ABSTRACTION).exists():
        return
    lines = local.read_text().splitlines() if local.exists() else []
    if setup.apparmor_rule(config.socket_directory) not in lines:
        problem = f"{local} lacks the rule for the sockets of storage processes"
        yield HostFault("apparmor-rule-missing", "AppArmor", problem, "virt-sse host init")


def has_systemd(config: Config) -> bool:
    """Whether systemd runs the host (sd_booted(3))."""
    return (config.root / "run/systemd/system").is_dir()


def units(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without enabled units, no agent watches keys after a restart of the machine."""
    root = host.config.root
    if not has_systemd(host.config):
        return
    for name in _AGENT_UNITS:
        folders = [root / folder for folder in _UNIT_FOLDERS]
        if not any((folder / name).exists() for folder in folders):
            remedy = f"virt-sse agent units {folders[0]}; systemctl enable --now virt-sse-agent"
            yield HostFault("unit-missing", "agent", f"the unit {name} is missing", remedy, Severity.WARNING)
            return
        if not any(folders[0].glob(f"*.wants/{name}")):
            problem = f"the unit {name} is not enabled: no agent after a restart of the machine"
            remedy = f"systemctl enable --now {name}"
            yield HostFault("unit-not-enabled", "agent", problem, remedy, Severity.WARNING)
