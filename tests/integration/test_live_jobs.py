"""Copies of disks of running domains: two at once, no room, a restart of libvirtd, odd sizes and paths."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.disk_contents import decrypted
from support.images import require
from support.loop_devices import block_disk, loop_device
from support.stage_site import StageSite, stage_site_fixtures
from support.waiting import wait_until
from virt_sse.domains.pause_locks import pause_locks
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.model.disks import Disk

M = 1 << 20
ODD_FOLDER = "é ü, 1:2 a=b;c"

running_site, site = stage_site_fixtures()


class Running:
    """A running guest with a raw disk of one layer and a qcow2 disk of two, each with a pattern."""

    def __init__(self, site: StageSite) -> None:
        self.site = site
        self.small = site.host.images / "small"  # QEMU's mount namespace sees no later mounts
        self.small.mkdir()
        site.run("mount", "-t", "tmpfs", "-o", "size=4M,mode=755", "tmpfs", self.small)
        self.names = [site.single_disk("raw", size=8 * M).name, site.disk("qcow2", size=8 * M).name]
        self.guest = site.guest(*self.disks)
        self.guest.start()
        for number in range(2):
            site.qemu_io(self.guest, f"write -P {0x50 + number} 1M 1M", disk=number)

    @property
    def disks(self) -> list[Disk]:
        return [self.site.backend.disks.get(name) for name in self.names]

    def check(self) -> None:
        """Check the guest and its data, and that nothing is left of copies."""
        site, guest = self.site, self.guest
        assert site.virsh("domstate", guest.name).strip() == "running"
        assert "<mirror" not in self.xml()
        for number in range(2):
            said = site.qemu_io(guest, f"read -P {0x50 + number} 1M 1M", disk=number)
            assert "read 1048576" in said
            assert "failed" not in said
        site.virt_sse("vm", "verify", guest.name)
        assert not [copy for copy in site.backend.host.store.replacements.all() if copy.name in self.names]
        assert not list(site.host.images.glob(".*"))
        assert {secret.split(":")[1] for secret in site.secrets()} == {str(disk.id) for disk in self.disks}

    def expect_copy(self, name: str, number: int) -> None:
        """Check the content of a copy of a disk, and delete the copy."""
        copy = self.site.backend.disks.get(name)
        assert decrypted(self.site.backend, copy)[M : 2 * M] == bytes([0x50 + number]) * M
        self.site.backend.disks.erase(copy)

    def xml(self) -> str:
        """The live definition."""
        return self.site.virsh("dumpxml", self.guest.name)

    @contextlib.contextmanager
    def kept_from_pausing(self) -> Iterator[None]:
        """Keep commands from pausing the guest during the block, as a command does that pauses the guest."""
        with contextlib.closing(self.site.host.connect()) as connection:
            domain_id = uuid.UUID(connection.lookupByName(self.guest.name).UUIDString())
        with pause_locks(self.site.backend.host.config).hold(domain_id):
            yield

    def await_copies(self) -> None:
        """Wait until QEMU has copied both disks."""
        wait_until(lambda: self.xml().count("ready='yes'") == 2, "both copies are ready", seconds=30)


@pytest.fixture(scope="module")
def running(running_site: StageSite) -> Iterator[Running]:
    running = Running(running_site)
    yield running
    running.guest.destroy()
    running.guest.undefine()
    running_site.run("umount", running.small)
    assert running_site.left() == {}


@pytest.fixture(autouse=True)
def _is_left_running(running: Running) -> Iterator[None]:
    yield
    running.check()


@pytest.mark.slow
def test_two_disks_of_a_domain_are_reencrypted_at_once_and_a_disk_once(
    running_site: StageSite, running: Running
) -> None:
    site = running_site
    before = [disk.id for disk in running.disks]
    with running.kept_from_pausing():
        jobs = [site.popen("virt-sse", "disk", "reencrypt", name) for name in running.names]
        running.await_copies()
        for command in (
            ("disk", "reencrypt", running.names[0]),
            ("snapshot", "create", "never", "--disk", running.names[1]),
            ("disk", "backup", running.names[1], site.host.directory),
        ):
            assert "is copying" in site.virt_sse(*command, status=1)
        assert [disk.id for disk in running.disks] == before, "a pivot waits for the end of another pause"
    for job in jobs:
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
    assert not {disk.id for disk in running.disks} & {*before}


@pytest.mark.slow
def test_a_copy_without_room_is_given_up(running_site: StageSite, running: Running) -> None:
    site = running_site
    for command in (
        ("snapshot", "create", "s", "--disk", running.names[0], "--path", running.small / "s.raw"),
        ("disk", "backup", running.names[0], running.small),
    ):
        said = site.virt_sse(*command, status=1)
        assert "is there room for the copy?" in said, said
        assert site.run("ls", "-A", running.small) == ""


@pytest.mark.slow
def test_a_restart_of_libvirtd_ends_a_snapshot_without_a_trace(
    running_site: StageSite, running: Running
) -> None:
    site = running_site
    with running.kept_from_pausing():
        command = site.popen("virt-sse", "snapshot", "create", "s", "--domain", running.guest.name)
        running.await_copies()
        site.host.restart_libvirtd()
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 1, said
    assert "Traceback" not in said
    assert json.loads(site.virt_sse("snapshot", "list", "-o", "json")) == []
    running.check()
    site.virt_sse("snapshot", "create", "s", "--domain", running.guest.name)
    for number in range(2):
        running.expect_copy(f"s-vd{'ab'[number]}", number)


@pytest.mark.slow
def test_paths_have_letters_of_any_kind(running_site: StageSite, running: Running) -> None:
    site = running_site
    folder = site.host.images / ODD_FOLDER
    folder.mkdir(exist_ok=True)
    number, name = 1, running.names[1]
    site.virt_sse("disk", "reencrypt", name, "--path", folder / f"{name} %41.img")
    assert site.backend.disks.get(name).path.parent == folder
    site.virt_sse("snapshot", "create", f"{name}-s", "--disk", name, "--path", folder / "s, 1:2")
    running.expect_copy(f"{name}-s", number)
    site.virt_sse("disk", "backup", name, folder)
    (point,) = folder.glob(f"{name}.*.qcow2")
    site.virt_sse("disk", "restore", point, f"{name}-r", "--path", folder / "r, 1:2")
    running.expect_copy(f"{name}-r", number)
    site.virt_sse("disk", "erase-backup", point)


def plain_guest(site: StageSite, *elements: str) -> Guest:
    guest = Guest(site.host, f"p{uuid.uuid4().hex[:8]}", acceleration=site.acceleration, disks=list(elements))
    guest.define()
    return guest


@contextlib.contextmanager
def linked_device(folder: Path) -> Iterator[Path]:
    """A block device of 4 MiB by the name of a symbolic link, as device managers make them."""
    below, link = folder / "linked-device", folder / "by-name"
    below.write_bytes(bytes(4 * M))
    with loop_device(below) as device:
        link.symlink_to(device)
        yield link
        link.unlink()


@contextlib.contextmanager
def logical_volume(folder: Path) -> Iterator[Path]:
    """An LVM volume of 4 MiB; made without udev, which containers lack."""
    require("lvm")
    if not Path("/dev/mapper/control").exists():
        pytest.skip("the kernel has no device mapper")
    below, group = folder / "physical-volume", f"virt-sse-{uuid.uuid4().hex[:8]}"
    below.write_bytes(b"")
    os.truncate(below, 32 * M)
    with loop_device(below) as device:
        only = f'filter=["a|^{device}$|","r|.*|"]'
        settings = (
            f'devices {{ {only} use_devicesfile=0 external_device_info_source="none" }} '
            "activation { udev_sync=0 udev_rules=0 }"
        )

        def lvm(command: str, *arguments: str | Path) -> None:
            subprocess.run(
                ["lvm", command, "--yes", "--config", settings, *arguments],
                check=True,
                capture_output=True,
                text=True,
            )

        try:
            lvm("vgcreate", group, device)
            lvm("lvcreate", "--size", "4m", "--name", "lv", group)
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"LVM makes no volume here: {exc.stderr.strip().splitlines()[0]}")
        try:
            yield Path("/dev", group, "lv")
        finally:
            lvm("vgremove", group)


@pytest.mark.slow
@pytest.mark.parametrize("volume", [linked_device, logical_volume])
def test_a_volume_is_encrypted_in_place(
    running_site: StageSite, volume: Callable[[Path], contextlib.AbstractContextManager[Path]]
) -> None:
    site = running_site
    with volume(site.host.images) as path:
        guest = plain_guest(site, block_disk(path))
        site.start_paused(guest)
        assert "wrote" in site.qemu_io(guest, "write -P 0x44 1M 2M")
        said = site.virt_sse("vm", "encrypt", guest.name, "--directory", site.host.images)
        assert f"{path} still holds the plaintext" in said
        assert site.backend.disks.get(f"{guest.name}-vda").size == 4 * M
        assert "failed" not in site.qemu_io(guest, "read -P 0x44 1M 2M")
        site.virt_sse("vm", "verify", guest.name)
        guest.destroy()
    for copy in site.backend.host.store.replacements.all():
        site.backend.host.store.replacements.remove(copy)
    guest.undefine()


@pytest.mark.slow
@pytest.mark.parametrize("runs", [True, False], ids=["running", "stopped"])
def test_files_of_any_length_and_block_devices_are_encrypted_in_place(
    running_site: StageSite, runs: bool
) -> None:
    """The guest's disk keeps its size: the length of the file, rounded up to a sector."""
    site = running_site
    folder = site.host.images
    odd, qcow2, below = folder / f"odd-{runs}.img", folder / f"odd-{runs}.qcow2", folder / f"device-{runs}"
    odd.write_bytes(b"\x11" * (M + 100))
    below.write_bytes(b"\x33" * (2 * M + 512))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, str(M + 1536)], check=True)
    with loop_device(below) as device:
        elements = (
            disk_xml(odd),
            disk_xml(qcow2, target="vdb", image_format="qcow2"),
            block_disk(device, "vdc"),
        )
        guest = plain_guest(site, *elements)
        site.start_paused(guest)
        assert "wrote" in site.qemu_io(guest, "write -P 0x22 1M 512", disk=1)
        if not runs:
            guest.destroy()
        said = site.virt_sse("vm", "encrypt", guest.name, "--directory", folder)
        assert f"{device} still holds the plaintext" in said
        disks = [site.backend.disks.get(f"{guest.name}-vd{letter}") for letter in "abc"]
        assert [disk.size for disk in disks] == [M + 512, M + 1536, 2 * M + 512]
        if not runs:
            site.start_paused(guest)
        for number, (pattern, offset, length) in enumerate(
            ((0x11, 0, M), (0x22, M, 512), (0x33, 0, 2 * M + 512))
        ):
            found = site.qemu_io(guest, f"read -P {pattern:#x} {offset} {length}", disk=number)
            assert f"read {length}/{length}" in found, found
            assert "failed" not in found
        tail = site.qemu_io(guest, f"read -P 0x11 {M} 100", disk=0)
        assert "failed" not in tail
        site.virt_sse("vm", "verify", guest.name)
        assert "is a block device" in site.virt_sse("vm", "encrypt", guest.name, "--wipe", status=1)
        assert below.read_bytes() == b"\x33" * (2 * M + 512)
    guest.destroy()
    for copy in site.backend.host.store.replacements.all():
        site.backend.host.store.replacements.remove(copy)
    guest.undefine()
