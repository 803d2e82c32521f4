"""Double encryption on a lab host: guests, what runs below them, and what is left of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.images import FORMATS, contains
from support.stage_site import StageSite, owner, stage_site_fixtures
from support.waiting import wait_until
from virt_sse.errors import DiskNotFoundError, ImageFormatError, StageError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import QEMU_USER
from virt_sse.lab.recipes import BOOT_SECTOR_TEXT, LinuxMicro
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.qemu import img

M = 1 << 20
Accelerate = Callable[[str], Acceleration]


running_site, site = stage_site_fixtures()


def test_a_guest_on_two_disks_has_its_stages_from_start_to_end(site: StageSite) -> None:
    disks = [site.disk("qcow2"), site.disk("raw", size=M)]
    assert [owner(disk) for disk in disks] == [0, 0]
    guest = site.guest(*disks)
    guest.start()

    stages = site.stage_processes()
    assert [Path(process.command[0]).name for process in stages] == ["qemu-storage-daemon"] * 2
    assert len({process.uid for process in stages}) == 2
    assert {process.uid for process in stages} <= set(site.backend.host.config.storage_uids)
    assert [owner(disk) for disk in disks] == [0, 0]
    assert site.secrets() == sorted(f"virt-sse:{disk.id}:service" for disk in disks)
    assert_out_of_qemus_reach(site, disks)
    keys = [site.dek(disk, entry.slot).passphrase for disk in disks for entry in disk.deks]
    assert len(set(keys)) == 4
    assert_nowhere(site, *keys)

    said = guest.wait_for("boot-sector: done")
    assert said.count("verified 8 sectors, ok") == 2
    guest.destroy()
    assert site.left() == {}
    assert [owner(disk) for disk in disks] == [0, 0]
    assert not contains([disk.path for disk in disks], BOOT_SECTOR_TEXT)
    for disk in disks:
        site.backend.disks.check(disk.name)
        plain = site.host.directory / disk.name
        site.backend.transfer.export(disk.name, plain, destination_format="raw")
        assert plain.read_bytes()[1000 * 512 :].startswith(BOOT_SECTOR_TEXT)
    assert_nowhere(site, *keys)


def assert_out_of_qemus_reach(site: StageSite, disks: list[Disk]) -> None:
    """QEMU's user connects to the guest's socket and is not served, and comes to nothing else of a stage."""
    config = site.backend.host.config
    for disk in disks:
        monitor = config.stage_directory / str(disk.id) / "qmp"
        guest, record = (
            site.backend.host.stages.guest_socket(disk.id),
            site.backend.host.stages.record(disk.id),
        )
        assert record
        assert record.qemu.uid == pwd.getpwnam(QEMU_USER).pw_uid
        script = (
            "import os, socket, sys\n"
            f"os.setgroups([]); os.setgid({record.qemu.gid}); os.setuid({record.qemu.uid})\n"
            "client = socket.socket(socket.AF_UNIX); client.connect(sys.argv[1])\n"
            "print('reached' if client.recv(1) else 'not served')\n"
            "for path in sys.argv[2:]:\n"
            "    try: socket.socket(socket.AF_UNIX).connect(path) if 'image' not in path else open(path)\n"
            "    except PermissionError: print('refused')\n"
            "    else: print('reached')"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", script, guest, monitor, disk.path], capture_output=True, text=True
        )
        assert done.stdout.splitlines() == ["not served", "refused", "refused"], done.stderr
        with socket.socket(socket.AF_UNIX) as root:
            root.connect(str(monitor))


def assert_nowhere(site: StageSite, *keys: bytes) -> None:
    """The keys are on no command line, in no environment, no log and no file of what runs."""
    for process in site.processes():
        with contextlib.suppress(OSError):
            for name in ("cmdline", "environ"):
                content = Path(f"/proc/{process.pid}/{name}").read_bytes()
                assert not any(key in content for key in keys), process
    folders = [
        site.host.root / "run/virt-sse",
        site.host.root / "run/virt-sse-disks",
        site.host.root / "var/log",
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    assert contains(files, *keys) == []


@pytest.mark.parametrize("image_format", FORMATS)
def test_no_snapshot_is_made_by_accident(site: StageSite, image_format: str) -> None:
    """It would be in plaintext, or QEMU would crash as it writes the memory into an encrypted image."""
    for disk in (site.disk(image_format, size=M), site.single_disk(image_format)):
        guest = site.guest(disk)
        for start in (lambda: None, lambda guest=guest: site.start_paused(guest)):
            start()
            for kind in ([], ["--disk-only"]):
                said = site.virsh("snapshot-create-as", guest.name, "s", *kind, status=1)
                assert re.search("nothing selected|require all disks to be selected", said), said
        assert guest.is_active()
        guest.destroy()


@pytest.mark.parametrize("image_format", FORMATS)
def test_discard_passes_both_layers_of_a_qcow2_disk_alone(site: StageSite, image_format: str) -> None:
    """A qcow2 disk's pass both layers. A raw one's do not: QEMU's driver for raw LUKS has no discard, and the
    zeroes that a guest writes are ciphertext below it.
    """
    disk = site.disk(image_format, size=16 * M)
    guest = site.guest(disk)
    site.start_paused(guest)

    def allocated() -> int:
        return disk.path.stat().st_blocks * 512

    assert "wrote 8388608" in site.qemu_io(guest, "write -P 0x5a 0 8M")
    full = allocated()
    assert full > 8 * M
    site.qemu_io(guest, "discard 0 4M")
    assert "wrote 4194304" in site.qemu_io(guest, "write -z -u 4M 4M")
    if image_format == "qcow2":
        wait_until(lambda: allocated() <= full - 8 * M + M // 2, "the image has given space back", seconds=5)
        assert "failed" not in site.qemu_io(guest, "read -P 0 0 8M")
    else:
        assert allocated() == full
        assert "failed" not in site.qemu_io(guest, "read -P 0x5a 0 4M")
    assert "failed" not in site.qemu_io(guest, "read -P 0 4M 4M")
    guest.destroy()
    site.backend.disks.check(disk.name)


class TestSize:
    def test_a_qcow2_disk_grows_under_a_guest(self, site: StageSite) -> None:
        disk = site.disk("qcow2", size=M)
        guest = site.guest(disk)
        site.start_paused(guest)
        site.virt_sse("disk", "resize", disk.name, "8M")
        assert f"Capacity:       {8 * M}" in site.virsh("domblkinfo", guest.name, "vda")
        assert "wrote 4096" in site.qemu_io(guest, f"write -P 0x5a {8 * M - 4096} 4096")
        guest.destroy()
        assert site.backend.disks.get(disk.name).size == 8 * M
        site.backend.disks.check(disk.name)

    def test_a_disk_beyond_its_prepared_room_grows_offline(self, site: StageSite) -> None:
        disk = site.disk("qcow2", size=M)
        guest = site.guest(disk)
        site.start_paused(guest)
        said = site.virt_sse("disk", "resize", disk.name, "1G", status=1)
        assert "cannot grow under a running guest" in said
        assert "stop the domain first" in said
        assert site.backend.disks.get(disk.name).size == M
        guest.destroy()
        site.virt_sse("disk", "resize", disk.name, "1G")
        site.start_paused(guest)
        assert f"Capacity:       {1 << 30}" in site.virsh("domblkinfo", guest.name, "vda")
        assert "wrote 4096" in site.qemu_io(guest, f"write -P 0x5a {(1 << 30) - 4096} 4096")

    def test_a_raw_disk_grows_under_a_guest_that_reconnects_and_offline_otherwise(
        self, site: StageSite
    ) -> None:
        disk = site.disk("raw", size=M)
        guest = site.guest(disk)
        site.start_paused(guest)
        if "<reconnect" in site.virsh("dumpxml", guest.name):
            site.virsh("resume", guest.name)
            site.backend.disks.resize(disk.name, 8 * M)
            assert f"Capacity:       {8 * M}" in site.virsh("domblkinfo", guest.name, "vda")
            return
        with pytest.raises(StageError, match="cannot grow under a running guest"):
            site.backend.disks.resize(disk.name, 8 * M)
        assert "read 512" in site.qemu_io(guest, "read 0 512")
        guest.destroy()
        site.backend.disks.resize(disk.name, 8 * M)
        site.start_paused(guest)
        assert f"Capacity:       {8 * M}" in site.virsh("domblkinfo", guest.name, "vda")


@pytest.mark.parametrize("image_format", FORMATS)
def test_delete_erases_what_the_keys_open(site: StageSite, image_format: str) -> None:
    disk = site.disk(image_format, size=M)
    keys = [site.dek(disk, entry.slot).passphrase for entry in disk.deks]
    kept = site.host.images / f"{disk.name}.kept"
    os.link(disk.path, kept)
    opening = [Dek(base64.b64decode(key)) for key in keys]
    img.check_unlocks(kept, disk.format, opening)
    site.backend.disks.delete(disk.name)
    assert not disk.path.exists()
    with pytest.raises(ImageFormatError):
        img.check_unlocks(kept, disk.format, opening)
    with pytest.raises(DiskNotFoundError):
        site.backend.disks.get(disk.name)


def test_two_domains_are_not_given_the_same_disk(site: StageSite) -> None:
    disk = site.disk("raw", size=M)
    guests = [site.guest(disk), site.guest(disk)]
    starts = [site.popen("virsh", "start", guest.name, "--paused") for guest in guests]
    said = [start.communicate(timeout=60)[0] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 1], said
    assert "in use by domain" in "".join(said)
    first, second = sorted(guests, key=Guest.is_active, reverse=True)
    assert f"in use by domain '{first.name}'" in site.virsh("start", second.name, "--paused", status=1)
    assert len(site.stage_processes()) == 1
    assert "wrote 512" in site.qemu_io(first, "write 0 512")
    first.destroy()
    site.start_paused(second)


def test_nothing_is_left_of_a_start_that_is_refused(site: StageSite) -> None:
    disks = [site.disk("raw", size=M) for _ in range(3)]
    guest = site.guest(*disks)
    holder = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(disks[0].path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdin
        assert holder.stdout
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert "in use by a running domain or another QEMU" in site.virsh("start", guest.name, status=1)
        assert site.left() == {}
    finally:
        holder.kill()
        holder.communicate()
    site.start_paused(guest)
    assert len(site.stage_processes()) == 3


def test_linux_plugs_discards_on_and_grows_a_double_disk(
    site: StageSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    """By our command inside the host, and by plain virsh."""
    disk = site.disk("qcow2", size=16 * M)
    guest = Guest(site.host, f"{disk.name}-linux", acceleration=acceleration("linux-micro"), boot=linux_micro)
    guest.start(
        "up() { while [ ! -e /dev/vda ]; do sleep 0.1; done; }\n"
        "down() { while [ -e /dev/vda ]; do sleep 0.1; done; }\n"
        "echo ready; up; cat /sys/block/vda/size\n"
        "dd if=/dev/zero bs=1M count=12 2>&- | tr '\\0' Z >/dev/vda; sync; echo full\n"
        "until [ $(cat /sys/block/vda/size) = 49152 ]; do sleep 0.1; done; echo grown\n"
        "blkdiscard -o 0 -l 8388608 /dev/vda; echo discarded\n"
        "echo plugged | dd of=/dev/vda bs=512 conv=sync 2>&-; sync; echo written\n"
        "down; echo gone; up; head -c 7 /dev/vda; echo; echo again; down; echo end; sleep 600"
    )
    guest.wait_for("ready")
    assert site.left() == {}
    site.virt_sse("disk", "attach", disk.name, guest.name)
    assert len(site.stage_processes()) == 1
    guest.wait_for("full")
    assert f"\n{16 * M // 512}\n" in guest.serial
    before = disk.path.stat().st_blocks * 512
    assert before > 12 * M
    site.virt_sse("disk", "resize", disk.name, "24M")
    guest.wait_for("grown")
    guest.wait_for("written")
    wait_until(
        lambda: disk.path.stat().st_blocks * 512 < before - 7 * M, "the image has given space back", seconds=5
    )
    site.virt_sse("disk", "detach", disk.name, guest.name)
    assert site.left() == {}
    assert owner(disk) == 0
    guest.wait_for("gone")
    site.virt_sse("disk", "attach", disk.name, guest.name)
    guest.wait_for("plugged\nagain")
    # libvirt runs no hook for this, and at the domain's end none that knows of the disk.
    site.virsh("detach-disk", guest.name, "vda", "--live")
    guest.wait_for("end")
    assert len(site.stage_processes()) == 1
    with LabAgent(site.host):
        wait_until(lambda: not site.left(), "nothing is left of guests and stages")
    assert owner(disk) == 0
    site.backend.disks.check(disk.name)


def test_start_and_stop_of_a_double_disk_are_counted(site: StageSite) -> None:
    disk = site.disk("raw", size=M)
    guest = site.guest(disk)
    state = site.host.root / "var/lib/virt-sse/image-states" / str(disk.id)

    def uses() -> tuple[int, bool]:
        document = json.loads(state.read_bytes())
        return document["uses"], document["inner"] is not None

    assert uses() == (1, False)
    site.start_paused(guest)
    assert uses() == (2, True)
    guest.destroy()
    wait_until(lambda: uses() == (3, True), "the stop is counted")
    site.virt_sse("disk", "check", disk.name)
    site.start_paused(guest)
    guest.destroy()
