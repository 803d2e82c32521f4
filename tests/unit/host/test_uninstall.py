"""``virt-sse host uninstall``."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    """A host with all that init installs, beside files of others."""
    abstraction = tmp_path / "etc/apparmor.d/abstractions/libvirt-qemu"
    abstraction.parent.mkdir(parents=True)
    abstraction.touch()
    local = tmp_path / "etc/apparmor.d/local/abstractions/libvirt-qemu"
    local.parent.mkdir(parents=True)
    local.write_text("/srv/** r,\n")
    hooks = tmp_path / "etc/libvirt/hooks"
    (hooks / "qemu.d").mkdir(parents=True)
    for other in (hooks / "qemu", hooks / "qemu.d/others"):
        other.write_text("#!/bin/sh\n")
    cli = CommandLine(tmp_path)
    cli("host", "init")
    units = tmp_path / "etc/systemd/system"
    cli("agent", "units", units)
    (units / "multi-user.target.wants").mkdir()
    (units / "multi-user.target.wants/virt-sse-agent.service").symlink_to(units / "virt-sse-agent.service")
    return cli


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def outside_of_state(found: dict[str, bytes]) -> set[str]:
    return {name for name in found if not name.startswith(("var/lib/virt-sse/", "var/log/virt-sse/"))}


def test_all_that_was_installed_is_removed_and_keys_stay(cli: CommandLine, tmp_path: Path) -> None:
    before = files(tmp_path)
    said = cli("host", "uninstall", "--dry-run")
    assert "would remove libvirt hook" in said
    assert files(tmp_path) == before

    said = cli("host", "uninstall")
    assert f"removed libvirt hook {tmp_path}/etc/libvirt/hooks/qemu.d/virt-sse\n" in said
    assert f"kept keys, store and records in {tmp_path}/var/lib/virt-sse\n" in said
    after = files(tmp_path)
    assert outside_of_state(after) == {
        "etc/apparmor.d/abstractions/libvirt-qemu",
        "etc/apparmor.d/local/abstractions/libvirt-qemu",
        "etc/libvirt/hooks/qemu",
        "etc/libvirt/hooks/qemu.d/others",
    }
    assert after["etc/apparmor.d/local/abstractions/libvirt-qemu"] == b"/srv/** r,\n"
    assert not list((tmp_path / "etc/systemd").rglob("*virt-sse*"))
    assert not (tmp_path / "etc/virt-sse").exists()
    assert {name for name in before if name.endswith(".key")} <= set(after)
    assert cli("host", "uninstall").startswith("nothing to remove\n")

    cli("host", "init")
    assert outside_of_state(files(tmp_path)) == outside_of_state(before) - {
        name for name in before if name.startswith("etc/systemd/")
    }


def test_the_rest_is_removed_after_a_kill(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "etc/libvirt/hooks/qemu.d/virt-sse").unlink()
    (tmp_path / "etc/systemd/system/virt-sse-agent.service").unlink()  # the link that enables the unit stays
    said = cli("host", "uninstall")
    assert "removed AppArmor rule" in said
    assert not list((tmp_path / "etc/systemd/system/multi-user.target.wants").iterdir())


@pytest.mark.slow
def test_existing_disks_are_not_abandoned_without_a_word(cli: CommandLine, tmp_path: Path) -> None:
    images.require("qemu-img", "cryptsetup")
    cli("disk", "create", "web", "--size", "1M", "--path", tmp_path / "web.qcow2")
    before = files(tmp_path)
    # No libvirt answers on this host, so domains with the disk may run.
    assert "libvirt" in cli.refuses("host", "uninstall", "--keep-disks")
    assert files(tmp_path) == before
