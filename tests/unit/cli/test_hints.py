"""What a message tells the user to do is the right thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine


@pytest.fixture
def virt_sse(tmp_path: Path) -> CommandLine:
    images.require("qemu-img", "cryptsetup")
    command = CommandLine(tmp_path)
    command("host", "init")
    return command


def test_a_failed_rewrap_names_the_command_that_goes_on(virt_sse: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "var/lib/libvirt/images"
    assert "make the folder" in virt_sse.refuses("disk", "create", "d", "--size", "1M")
    folder.mkdir(parents=True)
    virt_sse("des", "create", "s", "--provider", "platform-managed", "--key", "default")
    virt_sse("disk", "create", "d", "--size", "1M", "--des", "s")
    next(folder.iterdir()).unlink()
    said = virt_sse.refuses("key", "rotate", "default", "--provider", "platform-managed")
    assert "'virt-sse key rewrap default --provider platform-managed' rewraps them" in said
    assert "'virt-sse des rotate s' rewraps them" in virt_sse.refuses("des", "rotate", "s")


def test_an_empty_audit_log_is_neither_authentic_nor_forged(virt_sse: CommandLine) -> None:
    found = json.loads(virt_sse("audit", "verify", "--output", "json"))
    assert (found["whole"], found["records"], found["authentic"]) == (True, 0, None)
