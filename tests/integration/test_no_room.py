"""Commands that run out of space: a clear error, nothing half-made, and all well once there is room."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import images
from support.command_line import PROGRAM, CommandLine

pytestmark = pytest.mark.usefixtures("as_root")  # mounts a small file system

M = 1 << 20


def in_small_filesystem(folder: Path, size: str, *commands: str) -> str:
    """Run shell commands where *folder* is a file system of *size*, full of nothing; its files are kept."""
    images.require("unshare")
    script = f"set -e; cp -a {folder} {folder}.kept; mount -t tmpfs -o size={size},mode=700 none {folder}; "
    script += f"cp -a {folder}.kept/. {folder}; set +e; " + "; ".join(commands)
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr and "not permitted" in done.stderr:
        pytest.skip(f"no private mount namespaces: {done.stderr.strip()}")
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_creation_without_room_leaves_nothing(
    root: Path, virt_sse: CommandLine, tmp_path: Path, image_format: str
) -> None:
    virt_sse("host", "init")
    (tmp_path / "source").write_bytes(os.urandom(6 * M))
    folder = root / "var/lib/libvirt/images"
    said = in_small_filesystem(
        folder,
        "128k" if image_format == "qcow2" else "4k",
        f"{PROGRAM} disk create disk -s 10G --format {image_format}",
        "echo status $?",
        f"mount -o remount,size=4M {folder}",
        f"{PROGRAM} disk import disk {tmp_path}/source --source-format raw --format {image_format}",
        "echo status $?",
        f"{PROGRAM} disk create disk -s 64K --format {image_format}",
        f"{PROGRAM} disk export disk {folder}/out --plaintext --format raw",
        f"{PROGRAM} disk list -o json | grep -c name",
        f"ls -A {folder}",
    )
    assert said.count("status 1") == 2, said
    path = folder / f"disk.{image_format}"
    assert said.count(f"cannot make {path}: ") == 2, said
    assert said.lower().count("no space left on device") == 2, said
    assert f"1\n{path.name}\nout\n" in said, said


def test_an_export_without_room_leaves_nothing(root: Path, virt_sse: CommandLine, tmp_path: Path) -> None:
    virt_sse("host", "init")
    (tmp_path / "source").write_bytes(os.urandom(3 * M))
    virt_sse("disk", "import", "disk", tmp_path / "source", "--source-format", "raw")
    folder = tmp_path / "exports"
    folder.mkdir()
    said = in_small_filesystem(
        folder,
        "2M",
        f"{PROGRAM} disk export disk {folder}/out --plaintext",
        "echo status $?",
        f"ls -A {folder}",
    )
    assert said.startswith("status 1\n")
    assert said.endswith(f"cannot write {folder}/out: no space left on device\n"), said


def test_a_store_without_room_loses_no_disk(root: Path, virt_sse: CommandLine) -> None:
    virt_sse("host", "init")
    virt_sse("disk", "create", "disk", "-s", "1M")
    state = root / "var/lib/virt-sse"
    said = in_small_filesystem(
        state,
        "1M",
        f"head -c 2M /dev/zero > {state}/filler 2>/dev/null",
        f"{PROGRAM} disk create new -s 1M",
        "echo status $?",
        f"rm {state}/filler",
        f"{PROGRAM} disk list -o json | grep -c '\"name\"'",
        f"ls -A {root}/var/lib/libvirt/images",
    )
    assert "status 1\n1\ndisk.qcow2\n" in said, said
    assert "virt-sse: error: " in said
    assert any(reason in said for reason in ("full", "No space left on device", "disk I/O error")), said
