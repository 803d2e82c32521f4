"""``virt-sse host doctor``: each fault is found with its remedy, and gone once the remedy is applied."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from virt_sse.config import Config
from virt_sse.system import acceleration


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    cli = CommandLine(tmp_path)
    cli("host", "init")
    for folder in ("images", "var/lib/libvirt/images"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("db", "web"):
        cli("disk", "create", name, "--size", "1M", "--path", str(tmp_path / "images" / f"{name}.qcow2"))
    assert cli("host", "doctor") == "no faults found\n"
    return cli


def faults(cli: CommandLine) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(cli("host", "doctor", "-o", "json", status=1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_folder_of_images_that_others_may_write(cli: CommandLine, tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "images"
    folder.chmod(mode)
    (fault,) = faults(cli)
    assert fault["part"] == "disk db and 1 more"
    assert fault["problem"] == f"other users may write {folder} (mode {mode:04o})"
    subprocess.run(shlex.split(fault["remedy"]), check=True)
    assert cli("host", "doctor") == "no faults found\n"


@pytest.mark.slow
def test_parents_and_links_count(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "open/inner").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open/inner")
    cli("disk", "create", "far", "--size", "1M", "--path", str(tmp_path / "link/far.qcow2"))
    (fault,) = faults(cli)
    assert (fault["part"], fault["problem"]) == (
        "disk far",
        f"other users may write {tmp_path / 'open'} (mode 0777)",
    )
    (tmp_path / "open").chmod(0o1777)
    assert cli("host", "doctor") == "no faults found\n", "other users cannot rename root's folders there"


@pytest.mark.slow
@pytest.mark.root
def test_a_folder_of_another_user(cli: CommandLine, tmp_path: Path) -> None:
    os.chown(tmp_path / "images", 65534, 65534)
    (fault,) = faults(cli)
    assert fault["problem"] == f"{tmp_path / 'images'} belongs to user 65534"
    subprocess.run(shlex.split(fault["remedy"]), check=True)
    assert cli("host", "doctor") == "no faults found\n"


@pytest.mark.slow
def test_a_folder_that_is_gone_hides_no_other_fault(cli: CommandLine, tmp_path: Path) -> None:
    cli("disk", "create", "own", "--size", "1M")
    (tmp_path / "images").rename(tmp_path / "unmounted")
    (tmp_path / "var/lib/libvirt/images").chmod(0o777)
    assert [(each["part"], each["remedy"].split()[0]) for each in faults(cli)] == [
        ("disk db and 1 more", "mount"),
        ("disk own", "chmod"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["remove", "rewrite", "garble", "not executable", "open"])
def test_a_hook_that_libvirt_would_not_run_as_installed(
    cli: CommandLine, tmp_path: Path, change: str
) -> None:
    hook = tmp_path / "etc/libvirt/hooks/qemu.d/virt-sse"
    match change:
        case "remove":
            hook.unlink()
        case "rewrite":
            hook.write_text("#!/bin/sh\nexit 0\n")
        case "garble":
            hook.write_bytes(b"\xff")
        case "not executable":
            hook.chmod(0o644)
        case "open":
            hook.chmod(0o757)
    (fault,) = faults(cli)
    assert fault["part"] == "hook"
    cli("host", "init")
    assert cli("host", "doctor") == "no faults found\n"


@pytest.mark.slow
def test_state_in_a_folder_that_others_may_write(cli: CommandLine, tmp_path: Path) -> None:
    parent = tmp_path / "var/lib"
    parent.chmod(0o777)
    (fault,) = faults(cli)
    assert fault["problem"] == f"other users may write {parent} (mode 0777)"
    assert fault["remedy"] == f"chmod go-w {parent}"
    parent.chmod(0o755)
    assert json.loads(cli("host", "doctor", "-o", "json")) == []


def test_a_library_for_guests_that_is_not_this_versions() -> None:
    if reason := acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        cli = CommandLine(Path(folder))
        cli("host", "init")
        library = Config.load(Path(folder)).guest_library
        library.install()
        assert cli("host", "doctor") == "no faults found\n"
        earlier = library.path.read_bytes() + b"x"
        library.record.write_text(hashlib.sha256(earlier).hexdigest())
        for content, problem in (
            (earlier, "is not this version's library"),
            (b"x", "is not a library that virt-sse has installed"),
            (None, "is missing"),
        ):
            library.path.unlink(missing_ok=True)
            if content:
                library.path.write_bytes(content)
            (fault,) = faults(cli)
            assert fault["part"] == "library"
            assert fault["problem"] == f"{library.path} {problem}"
            assert fault["remedy"] == "virt-sse host init --accelerate"
