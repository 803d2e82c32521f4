"""Commands that lose data ask on a terminal, and do as told without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.loaded_commands import run_command
from support.terminals import on_terminal

LIBVIRT = "test:///default"
"""Says that no domain has the disks."""


@pytest.fixture
def virt_sse(tmp_path: Path) -> CommandLine:
    images.require("qemu-img", "cryptsetup")
    command = CommandLine(tmp_path)
    (tmp_path / "var/lib/libvirt/images").mkdir(parents=True)
    command("host", "init")
    return command


def test_a_deletion_asks_on_a_terminal(virt_sse: CommandLine, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        virt_sse("disk", "create", name, "--size", "1M")
    status, said = on_terminal(tmp_path, "disk", "delete", "a", answer="n\n", libvirt=LIBVIRT)
    assert (status, "delete disk a (" in said, "recoverable until 20" in said) == (1, True, True), said
    assert "a " in virt_sse("disk", "list")
    assert on_terminal(tmp_path, "disk", "delete", "a", answer="y\n", libvirt=LIBVIRT)[0] == 0
    assert on_terminal(tmp_path, "disk", "delete", "b", "--yes", libvirt=LIBVIRT)[0] == 0
    environment = os.environ | {"VIRT_SSE_ROOT": str(tmp_path), "LIBVIRT_DEFAULT_URI": LIBVIRT}
    assert run_command(["disk", "delete", "c"], environment).returncode == 0  # no terminal
    assert virt_sse("disk", "list", "--output", "json").strip() == "[]"
