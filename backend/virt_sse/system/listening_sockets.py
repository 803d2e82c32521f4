"""The listening sockets of a process (proc(5))."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TCP_LISTEN = "0A"
"""Linux ``TCP_LISTEN``, in ``/proc/net/tcp``."""
_UNIX_LISTENS = 0x10000
"""Linux ``SO_ACCEPTCON``, in the flags of ``/proc/net/unix``."""


def listening_sockets(pid: int) -> set[str]:
    """The names of a process's listening sockets: the port of a TCP socket, the path of a Unix socket.

    :raise OSError: When the process is gone.
    """
    folder = Path(f"/proc/{pid}")
    own = set()
    for entry in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(entry))  # noqa: PTH115 -- a Path would normalise "socket:[1]"
    return {name for inode, name in _listening(folder / "net") if f"socket:[{inode}]" in own}


def _listening(tables: Path) -> list[tuple[str, str]]:
    """Inode and name of each listening socket of a network namespace."""
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # without IPv6
            for line in (tables / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _TCP_LISTEN:
                    found.append((fields[9], str(int(fields[1].rpartition(":")[2], 16))))
    for line in (tables / "unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if int(fields[3], 16) & _UNIX_LISTENS:
            found.append((fields[6], fields[7] if len(fields) == 8 else ""))
    return found
