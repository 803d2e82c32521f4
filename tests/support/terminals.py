"""``virt-sse`` on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

from support.command_line import PROGRAM, no_libvirt


def on_terminal(
    root: Path, *arguments: str, answer: str = "", columns: int = 80, libvirt: str | None = None
) -> tuple[int, str]:
    """Exit status and output of a command on a terminal.

    :param answer: typed before the command reads.
    :param libvirt: URI; by default no libvirt answers.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    host = {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": libvirt or no_libvirt(root)}
    environment = os.environ | host
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [PROGRAM, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 4096):
            said += chunk
    os.close(ours)
    return process.wait(60), said.decode()
