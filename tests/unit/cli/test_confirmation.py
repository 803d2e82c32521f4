"""Commands that lose data ask on a terminal, and do as told without one."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from support import images
from support.command_line import CommandLine
from support.loaded_commands import PROGRAM, run_command
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.plugins import PluginHost

ASKING = (
    "disk delete",
    "disk erase-backup",
    "disk resize",
    "host evacuate",
    "host fence",
    "host hsm destroy",
    "image delete",
    "key purge",
    "snapshot delete",
    "snapshot restore",
    "vmss delete",
)


@pytest.fixture
def virt_sse(tmp_path: Path) -> CommandLine:
    images.require("qemu-img", "cryptsetup")
    command = CommandLine(tmp_path)
    (tmp_path / "var/lib/libvirt/images").mkdir(parents=True)
    command("host", "init")
    return command


def on_terminal(root: Path, answer: str, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a command on a terminal, with an answer typed."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": "test:///default"}
    process = subprocess.Popen(
        [PROGRAM, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(60), said.decode()


def test_a_deletion_asks_on_a_terminal(virt_sse: CommandLine, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        virt_sse("disk", "create", name, "--size", "1M")
    status, said = on_terminal(tmp_path, "n\n", "disk", "delete", "a")
    assert (status, "erase disk a (" in said) == (1, True), said
    assert "a " in virt_sse("disk", "list")
    assert on_terminal(tmp_path, "y\n", "disk", "delete", "a")[0] == 0
    assert on_terminal(tmp_path, "", "disk", "delete", "b", "--yes")[0] == 0
    environment = os.environ | {"VIRT_SSE_ROOT": str(tmp_path), "LIBVIRT_DEFAULT_URI": "test:///default"}
    assert run_command(["disk", "delete", "c"], environment).returncode == 0  # no terminal
    assert virt_sse("disk", "list", "--output", "json").strip() == "[]"


def test_these_commands_can_be_told_not_to_ask() -> None:
    found = []

    def walk(command: Any, path: str) -> None:
        if isinstance(command, TyperGroup):
            for name, each in command.commands.items():
                walk(each, f"{path} {name}".strip())
        elif any("--yes" in parameter.opts for parameter in command.params):
            found.append(path)

    walk(typer.main.get_command(build(PluginHost(Config.load()))), "")
    assert sorted(found) == sorted(ASKING)
