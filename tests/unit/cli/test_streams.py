"""Standard streams that are closed, full or a closed pipe: an error line or silence, never a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from support.command_line import PROGRAM, no_libvirt
from virt_sse.backend import Backend


def run(root: Path, arguments: str) -> tuple[int, str]:
    """Status and standard error of ``virt-sse`` with redirections of the shell."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shlex.quote(str(PROGRAM))} {arguments}"],
        env=os.environ | {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


COMMANDS = ("disk list", "disk list --output json", "--help", "--version", "audit list", "host init")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
        (">&- <&-", "Bad file descriptor"),
    ],
)
def test_a_failing_standard_output_is_one_error_line(
    root: Path, backend: Backend, command: str, redirection: str, reason: str
) -> None:
    expected = f"virt-sse: error: cannot write to standard output: {reason}\n"
    assert run(root, f"{command} {redirection}") == (1, expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_pipe_is_silence(root: Path, backend: Backend, command: str) -> None:
    status, said = run(root, f"{command} | true; sleep 0; ")
    assert said == ""
    assert status in (0, 1)  # 0: the other process had not ended yet


def test_a_command_without_standard_error_works(root: Path, backend: Backend) -> None:
    assert run(root, "disk list 2>&-") == (0, "")
    assert run(root, "disk show missing 2>&-") == (1, "")
    assert run(root, "disk show missing 2>/dev/full") == (1, "")
    assert run(root, "disk list >&- 2>&- <&-") == (1, "")


def test_the_store_never_gets_the_descriptor_of_a_closed_stream(root: Path, backend: Backend) -> None:
    """Otherwise the output of a command, or of its child processes, would be written into the store."""
    assert run(root, "disk create one --size 1M >&- 2>&- <&-")[0] == 1
    with Backend.open(root) as again:
        assert [disk.name for disk in again.disks.all()] == ["one"]
        again.disks.check("one")
