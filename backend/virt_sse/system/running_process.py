"""Evidence from the kernel: the code and the environment of a process (proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..x. [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) (\d+) +(/.*)")
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A file with code of a process.

    :ivar name: the path according to the kernel; the former path of a deleted or replaced file.
    :ivar range: the addresses, as in ``/proc/PID/map_files``, whose entry opens the file even if deleted.
    """

    name: str
    range: str

    @property
    def basename(self) -> str:
        """The last part of :attr:`name`."""
        return os.path.basename(self.name)  # noqa: PTH119 -- a name, maybe not of this mount namespace


def mapped_files(pid: int) -> list[MappedFile]:
    """The files that a process has mapped executable, once each; empty if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text("utf-8", errors="replace")
    except OSError:
        return []
    found: dict[tuple[str, str], MappedFile] = {}
    for line in text.splitlines():
        if match := _LINE.fullmatch(line):
            start, end, device, inode, name = match.groups()
            addresses = f"{int(start, 16):x}-{int(end, 16):x}"  # map_files has no leading zeros
            found.setdefault((device, inode), MappedFile(name.removesuffix(_DELETED), addresses))
    return list(found.values())


def environment(pid: int) -> list[tuple[str, str]]:
    """The environment with which a process was started; empty if the process has ended."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return []
    pairs = (each.partition("=") for each in content.decode(errors="replace").split("\0"))
    return [(name, value) for name, separator, value in pairs if separator]


def command_line(pid: int) -> list[str]:
    """The command line of a process; empty if the process has ended."""
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return content.decode(errors="replace").removesuffix("\0").split("\0")


def qemu_process(pid_file: Path, vm_id: UUID) -> int | None:
    """The pid of a domain's QEMU, from libvirt's pid file; ``None`` if not visible in this PID namespace."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return None
    return pid if str(vm_id) in command_line(pid) else None
