"""Runs the real ``virt-sse``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.loaded_commands import PROGRAM, run_command

__all__ = ["PROGRAM", "CommandLine", "no_libvirt"]


def no_libvirt(root: Path) -> str:
    """A libvirt URI without a libvirt, so that this machine's libvirt is never asked."""
    return f"qemu+unix:///system?socket={root / 'no-libvirt'}"


class CommandLine:
    """``virt-sse`` on the host under *root*, each command in its own process and without a libvirt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._host = {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)}

    def __call__(self, *arguments: str | bytes | Path, status: int = 0) -> str:
        """The standard output of a command that exits with *status*."""
        return self._run(arguments, status).stdout

    def refuses(self, *arguments: str | bytes | Path, status: int = 1) -> str:
        """The error line and the hint, if any, of a command that must fail."""
        message = self._run(arguments, status).stderr
        lines = message.splitlines()
        assert lines, "nothing was said"
        assert len(lines) <= 2, message
        assert lines[0].startswith("virt-sse: error: "), message
        assert all(line.startswith("virt-sse: hint: ") for line in lines[1:]), message
        return message

    def warns(self, *arguments: str | bytes | Path) -> str:
        """The warning of a command that succeeds."""
        message = self._run(arguments, 0).stderr
        assert message.startswith("virt-sse: warning: "), message
        return message

    def warns_and_refuses(self, *arguments: str | bytes | Path) -> str:
        """The standard error of a command that must fail after a warning."""
        return self._run(arguments, 1).stderr

    def _run(
        self, arguments: tuple[str | bytes | Path, ...], status: int
    ) -> subprocess.CompletedProcess[str]:
        done = run_command(arguments, os.environ | self._host)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done
