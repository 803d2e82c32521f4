"""Programs that the host's disks need, the agent, and refusals by AppArmor or SELinux."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_sse.agent_client import ask
from virt_sse.config import Config
from virt_sse.errors import AgentUnavailableError, VirtSseError
from virt_sse.host.capabilities import cipher_capability
from virt_sse.host.checks.installation import has_systemd, libvirtd_pid_file
from virt_sse.host.fault import HostFault, Severity
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk
from virt_sse.model.layers import HostCaching, Placement
from virt_sse.system.tools import run

_TOOLS = {
    "bwrap": "bubblewrap",
    "cryptsetup": "cryptsetup-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
}
_STORAGE_DAEMON = {"qemu-storage-daemon": "qemu-system-common"}
_CACHE = {"nbdkit": "nbdkit"}
_LOGS = ("var/log/audit/audit.log", "var/log/kern.log", "var/log/syslog", "var/log/messages")
_DENIALS = ('apparmor="DENIED"', "avc:  denied")
_TAIL = 4 << 20
_JOURNAL = ("journalctl", "-k", "-q", "--no-pager", "-n", "2000", "-o", "cat")
_SECONDS = 10.0


def tools(host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Tools that every disk needs, and those that the store's disks need."""
    needed = dict(_TOOLS)
    if any(len(disk.deks) > 1 or _placement(host.config, disk) is Placement.STORAGE for disk in disks):
        needed |= _STORAGE_DAEMON
    if any(disk.caching is not HostCaching.NONE for disk in disks):
        needed |= _CACHE
    for tool, package in needed.items():
        if shutil.which(tool) is None:
            yield HostFault("tool-missing", tool, f"{tool} is not installed", f"apt-get install {package}")


def _placement(config: Config, disk: Disk) -> Placement:
    return disk.placement or config.placement


def supported_ciphers(_host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Ciphers of disks that QEMU lacks, e.g. after an update."""
    names: dict[str, str] = {}
    for disk in disks:
        for entry in disk.deks:
            if str(entry.cipher) in names:
                continue
            names[str(entry.cipher)] = disk.name
            found = cipher_capability(entry.cipher)
            if not found.available:
                problem = f"QEMU cannot use cipher {entry.cipher}: {found.detail}"
                remedy = "install a QEMU with the cipher, or 'virt-sse disk reencrypt' where it is available"
                yield HostFault("cipher-missing", f"disk {disk.name}", problem, remedy)


def agent(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Without an agent, no key is watched; a socket without an agent delays each start of a domain."""
    config = host.config
    if not libvirtd_pid_file(config).exists() and not config.agent_socket.exists():
        return  # no domains to watch
    try:
        ask(config.agent_socket, "GET", "/status", timeout=config.agent.timeout)
    except AgentUnavailableError as exc:
        restart = "systemctl restart virt-sse-agent.socket virt-sse-agent"
        remedy = restart if has_systemd(config) else "run 'virt-sse agent run' under a supervisor"
        if config.agent_socket.exists():
            problem = f"no agent answers at {config.agent_socket}: {exc}"
            yield HostFault("agent-socket-stale", "agent", problem, remedy, Severity.WARNING)
        else:
            problem = "the agent does not run: revoked keys stop no domain"
            yield HostFault("agent-not-running", "agent", problem, remedy, Severity.WARNING)


def denials(host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Refusals in the system's logs that name a file of virt-sse or a folder of images."""
    names = {"virt-sse", *(str(disk.path.parent) for disk in disks)}
    for source, text in _logs(host.config):
        lines = [
            line
            for line in text.splitlines()
            if any(kind in line for kind in _DENIALS) and any(name in line for name in names)
        ]
        if lines:
            what = "AppArmor" if _DENIALS[0] in lines[-1] else "SELinux"
            problem = f"{len(lines)} refusals in {source}, the last: {lines[-1][-300:]}"
            remedy = (
                "virt-sse host init adds AppArmor's rule; otherwise allow the access in the profile or policy"
            )
            yield HostFault("access-denied", what, problem, remedy, Severity.WARNING)


def _logs(config: Config) -> Iterator[tuple[str, str]]:
    for name in _LOGS:
        path = config.root / name
        try:
            with path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                yield str(path), file.read().decode(errors="replace")
        except FileNotFoundError:
            continue
    if config.root == Path("/") and shutil.which("journalctl"):
        try:
            yield "the journal", run(_JOURNAL, confinement=None, timeout=_SECONDS)
        except VirtSseError:
            return  # a journal may be absent or refused
