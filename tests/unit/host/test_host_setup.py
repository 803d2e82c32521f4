"""``virt-sse host init`` and ``host capabilities`` in a root of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine, no_libvirt
from virt_sse.agent.systemd import write_units
from virt_sse.backend import Backend
from virt_sse.cli.reference import command_line
from virt_sse.cli.roff import write_man_pages
from virt_sse.config import Config
from virt_sse.host import capabilities, guest_acceleration
from virt_sse.host.capabilities import Capability
from virt_sse.host.guest_acceleration import accelerate_guests
from virt_sse.host.setup import APPARMOR_ABSTRACTION, APPARMOR_LOCAL, apparmor_rule, initialise
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.users import User
from virt_sse.model.ciphers import KNOWN
from virt_sse.model.disks import NewDisk
from virt_sse.stages import seccomp
from virt_sse.stages.storage_user import storage_user
from virt_sse.system import acceleration
from virt_sse.system.files import shared_folder

CAPABILITIES = """\
<capabilities><host>
  <secmodel><model>apparmor</model><doi>0</doi></secmodel>
  <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+108</baselabel></secmodel>
</host></capabilities>
"""


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A root that all users can read, as the library needs."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_credentials_have_a_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "etc/virt-sse"
    assert f"made folder {folder}" in CommandLine(tmp_path)("host", "init")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_apparmor_is_told_where_guests_find_their_disks(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    assert "AppArmor" not in cli("host", "init")
    abstraction, local = tmp_path / APPARMOR_ABSTRACTION, tmp_path / APPARMOR_LOCAL
    abstraction.parent.mkdir(parents=True)
    abstraction.touch()
    local.parent.mkdir(parents=True)
    local.write_text("/srv/isos/** r,")
    assert f"made AppArmor rule in {local}" in cli("host", "init")
    rule = apparmor_rule(Config.load(tmp_path).socket_directory)
    assert local.read_text().splitlines() == ["/srv/isos/** r,", rule]
    assert "nothing to do" in cli("host", "init")


def test_the_hosts_capabilities_are_found(tmp_path: Path) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    rows = json.loads(CommandLine(tmp_path)("host", "capabilities", "--output", "json"))
    found = {row["capability"]: row for row in rows}
    assert found["disks"]["available"]
    assert {f"cipher {cipher}" for cipher in KNOWN} <= found.keys()
    assert found["cipher aes-256-xts"]["available"]
    assert found["accelerated XTS"]["available"] == (acceleration.library() is not None)
    assert not found["libvirt"]["available"]
    assert "does not answer" in found["libvirt"]["detail"]


def guest_row(root: Path) -> tuple[bool, str]:
    found = capabilities.guest_capability(Config.load(root))
    return found.available, found.detail


def test_the_library_for_guests_is_installed_where_qemu_gains(open_root: Path) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    if reason := acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    cli = CommandLine(open_root)
    path = Config.load(open_root).guest_library.path
    assert guest_row(open_root) == (False, "off; 'virt-sse host init --accelerate' turns it on")
    said = cli("host", "init", "--accelerate")
    assert "keyring" in said
    assert re.search(rf"^made library {path}: QEMU encrypts \d+\.\d times as fast", said, re.MULTILINE)
    assert guest_row(open_root) == (True, str(path))
    assert cli("host", "init") == "nothing to do\n"
    assert "kept library" in cli("host", "init", "--accelerate")
    path.write_bytes(b"x")
    assert guest_row(open_root) == (False, f"{path} is not a library that virt-sse has installed")
    assert f"made library {path}" in cli("host", "init")
    assert guest_row(open_root) == (True, str(path))
    assert f"removed library {path}" in cli("host", "init", "--no-accelerate")
    assert not path.exists()
    assert cli("host", "init") == "nothing to do\n"
    assert "nothing to remove" in cli("host", "init", "--no-accelerate")


def test_the_library_for_guests_stays_off_where_qemu_does_not_gain(
    open_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU without nettle: a program that does not load nettle, in the place of qemu-img."""
    images.require("qemu-img", "qemu-io", "cryptsetup")
    if reason := acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    config = Config.load(open_root)
    with monkeypatch.context() as changed:
        changed.setenv("VIRT_SSE_XTS", "nettle")
        assert "QEMU does not use nettle" in accelerate_guests(config)
        assert capabilities.xts_capability().detail == "QEMU does not use nettle, or a self-test failed"
    with monkeypatch.context() as changed:
        (open_root / "bin").mkdir()
        (open_root / "bin/qemu-img").symlink_to("/bin/true")
        changed.setenv("PATH", f"{open_root}/bin:{os.environ['PATH']}")
        assert "QEMU does not use nettle" in accelerate_guests(config)
    with monkeypatch.context() as changed:
        changed.setattr(guest_acceleration, "_LEAST_GAIN", 1000)
        assert re.search(r"only \d+\.\d times as fast", accelerate_guests(config))
    assert not config.guest_library.is_wanted
    assert guest_acceleration.measured_gain() > 0


def test_no_cipher_is_available_without_qemus_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tool itself is not there: that says nothing of ciphers, and none is claimed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", no_libvirt(tmp_path))
    found = capabilities.probe(Config.load(tmp_path))
    kernels = ("seccomp filter for storage processes", "Landlock for storage processes", "cloud profile")
    assert [each.name for each in found if each.available and each.name not in kernels] == []


def test_the_users_of_qemu_and_of_storage_daemons_are_found() -> None:
    qemu = HostCapabilities.parse(CAPABILITIES).qemu_user
    assert qemu == User(64055, 108)
    assert storage_user("1234") == User(1234, 1234)
    assert storage_user("nobody").uid == 65534


def test_whether_each_storage_process_has_a_user_is_told() -> None:
    def found(config: Config) -> Capability:
        return capabilities.users_capability(config, User(64055, 108))

    config = Config.load(Path("/nonexistent"))
    assert found(config) == Capability(
        "a user per storage process", available=True, detail="uids 2100000000-2100065535"
    )
    shared = found(dataclasses.replace(config, storage_user="64055"))
    assert not shared.available
    assert shared.detail == "uid 64055 for all ('storage-user'), the same as QEMU"
    assert not found(dataclasses.replace(config, storage_user="no-such-user")).available


def test_a_missing_libseccomp_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_LIBRARY", "no-such-library.so")
    seccomp.stage_filter.cache_clear()
    try:
        found = capabilities.seccomp_capability()
    finally:
        seccomp.stage_filter.cache_clear()
    assert not found.available
    assert found.detail == "no-such-library.so is not installed"


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_modes_are_set_and_not_inherited(tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    root = tmp_path / "root"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", no_libvirt(root))
    before = os.umask(mask)
    try:
        root.mkdir(mode=0o755)
        (root / APPARMOR_ABSTRACTION).parent.mkdir(parents=True, mode=0o755)
        (root / APPARMOR_ABSTRACTION).touch()
        theirs = {path: path.stat().st_mode for path in (root, *root.rglob("*"))}
        with Backend.open(root) as backend:
            initialise(backend.host)
            disks = shared_folder(backend.host.config.disk_directory)
            backend.disks.create(NewDisk(name="disk", size=1 << 20))
            units = write_units(root / "units", backend.host.config)
        write_man_pages(root / "man/man1", command_line())
    finally:
        os.umask(before)
    ours = {path: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path not in theirs}
    assert {path: oct(mode) for path, mode in ours.items() if mode & 0o022} == {}
    assert ours[backend.host.config.hook_path] == 0o755
    assert ours[backend.host.config.hook_path.parent] == 0o755
    assert ours[disks] == 0o755
    assert {ours[path] for path in units} == {0o644}
    assert ours[root / APPARMOR_LOCAL] == 0o644
    state = backend.host.config.state_directory
    assert {mode & 0o077 for path, mode in ours.items() if state in (path, *path.parents)} == {0}


def test_the_mode_of_the_hook_script_is_restored(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    cli("host", "init")
    hook = Config.load(tmp_path).hook_path
    hook.chmod(0o777)
    assert "libvirt hook" in cli("host", "init")
    assert stat.S_IMODE(hook.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("policy", "available", "detail"),
    [
        ("", True, "current, of 2026-04"),
        ('profile = "2020"', True, "2020, of 2020-07"),
        ('profile = "2020"\nenforce = false', True, "2020, of 2020-07; not enforced"),
        ('profile = "1999"', False, "no profile '1999' of the cloud's rules"),
    ],
)
def test_the_cloud_profile_and_the_date_of_its_source_are_told(
    tmp_path: Path, policy: str, available: bool, detail: str
) -> None:
    path = tmp_path / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f"[policy]\n{policy}\n")
    found = capabilities.cloud_profile(Config.load(tmp_path))
    assert (found.available, found.detail) == (available, detail)
