"""Re-encryption of disks, without a domain and under a running guest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import libvirt
import pytest

from support.images import FORMATS
from support.stage_site import StageSite, stage_site
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disks import Disk, DiskState
from virt_sse.qemu import image_file, luks

M = 1 << 20
SIZE = 8 * M
KILLS = range(1, 1 + int(os.environ.get("VIRT_SSE_COPY_KILLS", "1")))
"""Seeds of the moments at which a command is killed."""
Accelerate = Callable[[str], Acceleration]


@pytest.fixture(scope="module")
def running_site(lab_host: LabHost, acceleration: Accelerate) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector")) as site:
        yield site


@pytest.fixture
def site(running_site: StageSite) -> Iterator[StageSite]:
    yield running_site
    running_site.forget_domains()
    assert running_site.left() == {}
    assert running_site.backend.host.store.replacements.all() == []
    assert not list(running_site.host.images.glob(".*"))


def new_disk(site: StageSite, image_format: str = "qcow2", *, double: bool = False, size: int = SIZE) -> Disk:
    if double:
        return site.disk(image_format, size=size)
    return site.single_disk(image_format, size=size)


def write(site: StageSite, guest: Guest, pattern: int, offset: str = "0", length: str = "1M") -> None:
    assert "wrote" in site.qemu_io(guest, f"write -P {pattern} {offset} {length}")


def expect(site: StageSite, guest: Guest, pattern: int, offset: str = "0", length: str = "1M") -> None:
    said = site.qemu_io(guest, f"read -P {pattern} {offset} {length}")
    assert "read" in said
    assert "Pattern verification failed" not in said


def volume_keys(site: StageSite, disk: Disk) -> bytes:
    """The salted digest of the outermost volume key, which differs for each volume key."""
    with image_file.opened(disk.path) as descriptor:
        offset, _ = image_file.luks_area(descriptor, disk.format)
        return os.pread(descriptor, luks.HEADER_END, offset)[112:208]


def reencrypted(site: StageSite, disk: Disk, *options: str | Path) -> Disk:
    """The disk after a re-encryption; the old one has left nothing."""
    before = volume_keys(site, disk)
    site.virt_sse("disk", "reencrypt", disk.name, *options)
    after = site.backend.disks.get(disk.name)
    assert after.id != disk.id
    assert after.size == disk.size
    assert volume_keys(site, after) != before
    assert list(disk.path.parent.glob(f"{disk.name}*")) == [after.path]
    assert disk.id not in {each.id for each in site.backend.disks.all()}
    return after


@pytest.mark.parametrize(("image_format", "double"), [("qcow2", False), ("raw", True)])
def test_offline_the_disk_keeps_content_path_and_domain(
    site: StageSite, image_format: str, double: bool
) -> None:
    disk = new_disk(site, image_format, double=double)
    guest = site.guest(disk)
    site.start_paused(guest)
    write(site, guest, 0x5A)
    guest.destroy()
    after = reencrypted(site, disk)
    assert after.path == disk.path
    site.start_paused(guest)
    expect(site, guest, 0x5A)
    if image_format == "qcow2":  # what was never written reads as random bytes from a raw image
        expect(site, guest, 0, "1M", "7M")
    site.virt_sse("vm", "verify", guest.name)
    guest.destroy()
    site.virt_sse("disk", "check", disk.name)


@pytest.mark.parametrize(
    ("before", "after", "double", "to_double"),
    [("qcow2", "qcow2", False, False), ("raw", "qcow2", False, True), ("qcow2", "raw", True, True)],
    ids=["single", "single-to-double", "double"],
)
def test_online_the_guest_goes_on_with_its_data(
    site: StageSite, before: str, after: str, double: bool, to_double: bool
) -> None:
    disk = new_disk(site, before, double=double)
    guest = site.guest(disk)
    site.start_paused(guest)
    write(site, guest, 0x5A)
    new = reencrypted(site, disk, "--format", after, *(["--des", site.set] if to_double else []))
    assert not disk.path.exists()
    assert len(new.deks) == (2 if to_double else 1)
    expect(site, guest, 0x5A)
    write(site, guest, 0x77, "4M")
    site.virt_sse("vm", "verify", guest.name)
    assert site.secrets() == [f"virt-sse:{new.id}:service"]
    guest.destroy()
    site.start_paused(guest)
    expect(site, guest, 0x5A)
    expect(site, guest, 0x77, "4M")
    site.virt_sse("vm", "verify", guest.name)
    guest.destroy()
    site.virt_sse("disk", "check", disk.name)


def plain_guest(site: StageSite, *elements: str) -> Guest:
    guest = Guest(site.host, f"p{uuid.uuid4().hex[:8]}", acceleration=site.acceleration, disks=list(elements))
    guest.define()
    return guest


@pytest.mark.parametrize("runs", [True, False], ids=["running", "stopped"])
def test_a_plaintext_domain_is_encrypted_in_place(site: StageSite, runs: bool) -> None:
    folder = site.host.images
    raw, top = folder / f"raw {runs}.img", folder / f"top {runs}, 1:2 é.qcow2"
    base = folder / f"base {runs}.qcow2"
    raw.write_bytes(bytes(SIZE))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, str(SIZE)], check=True)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 2M", base], check=True, capture_output=True
    )
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top], check=True)
    guest = plain_guest(
        site,
        disk_xml(raw),
        disk_xml(top, target="vdb", image_format="qcow2"),
    )
    site.start_paused(guest)
    write(site, guest, 0x22)
    assert "wrote" in site.qemu_io(guest, "write -P 0x33 1M 1M", disk=1)
    if not runs:
        guest.destroy()
    said = site.virt_sse("vm", "encrypt", guest.name)
    assert f"{raw} still holds the plaintext" in said
    if not runs:
        site.start_paused(guest)
    site.virt_sse("vm", "verify", guest.name)
    for disk, pattern, offset in ((0, 0x22, "0"), (1, 0x11, "0"), (1, 0x33, "1M")):
        found = site.qemu_io(guest, f"read -P {pattern:#x} {offset} 1M", disk=disk)
        assert "failed" not in found
        assert "read 1048576" in found
    guest.destroy()
    site.start_paused(guest)
    site.virt_sse("vm", "verify", guest.name)
    expect(site, guest, 0x22)
    said = site.virt_sse("vm", "encrypt", guest.name, "--wipe")
    assert "flash memory" in said
    assert not raw.exists()
    assert not top.exists()
    assert base.exists()
    guest.destroy()


def test_a_job_excludes_other_work_outlives_libvirtd_and_is_cancelled(site: StageSite) -> None:
    disk = new_disk(site, "raw")
    guest = site.guest(disk)
    site.start_paused(guest)
    write(site, guest, 0x5A)
    job = site.popen("virt-sse", "disk", "reencrypt", disk.name, "--max-rate", "32K")
    wait_until(lambda: "<mirror" in site.virsh("dumpxml", guest.name), "QEMU copies", seconds=30)
    for command in (
        ["reencrypt", disk.name],
        ["resize", disk.name, "16M"],
        ["detach", disk.name, guest.name],
        ["delete", disk.name],
    ):
        refused = site.virt_sse("disk", *command, status=1)
        assert re.search("is copying|is attached", refused), refused
    snapshot = ["snapshot-create-as", guest.name, "s", "--disk-only", "--diskspec", "vda,snapshot=external"]
    assert "active block job" in site.virsh(*snapshot, status=1)
    site.virt_sse("vm", "verify", guest.name)
    site.host.restart_libvirtd()
    wait_until(lambda: "<mirror" in site.virsh("dumpxml", guest.name), "libvirt has the guest again")
    assert job.poll() is None
    assert "is as before" in site.virt_sse("disk", "reencrypt", disk.name, "--cancel")
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 1
    assert "was cancelled" in said
    assert site.backend.disks.get(disk.name) == disk
    assert "<mirror" not in site.virsh("dumpxml", guest.name)
    assert site.secrets() == [f"virt-sse:{disk.id}:service"]
    expect(site, guest, 0x5A)
    write(site, guest, 0x77)
    site.virt_sse("vm", "verify", guest.name)
    guest.destroy()


def test_no_room_leaves_the_disk_as_before(site: StageSite) -> None:
    small = site.host.images / "small"
    small.mkdir(exist_ok=True)
    site.run("mount", "-t", "tmpfs", "-o", "size=4M,mode=755", "tmpfs", small)
    try:
        disk = new_disk(site, "raw")
        guest = site.guest(disk)
        for starts in (False, True):
            if starts:
                site.start_paused(guest)
                write(site, guest, 0x5A)
            said = site.virt_sse("disk", "reencrypt", disk.name, "--path", small / "new.raw", status=1)
            assert "no space left on device" in said
            assert site.run("ls", "-A", small) == ""
            assert site.backend.disks.get(disk.name) == disk
        expect(site, guest, 0x5A)
        guest.destroy()
    finally:
        site.run("umount", small)
        small.rmdir()


def test_a_taken_path_is_refused(site: StageSite) -> None:
    disk = new_disk(site)
    taken = site.host.images / "taken.qcow2"
    taken.write_bytes(b"anything")
    said = site.virt_sse("disk", "reencrypt", disk.name, "--path", taken, status=1)
    assert "exists already" in said
    assert taken.read_bytes() == b"anything"
    assert site.backend.disks.get(disk.name) == disk
    taken.unlink()


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_command_leaves_one_whole_disk(site: StageSite, seed: int) -> None:
    """The next command finishes or undoes the copy, under a guest that runs."""
    random = Random(seed)  # noqa: S311 -- no secret
    disk = new_disk(site, random.choice(FORMATS), double=random.random() < 0.3)
    guest = site.guest(disk)
    runs = random.random() < 0.8
    if runs:
        site.virsh("start", guest.name)
        write(site, guest, 0x5A)
    job = site.popen("virt-sse", "disk", "reencrypt", disk.name, "--max-rate", "8M")
    time.sleep(random.uniform(0.5, 4.0))
    for process in site.processes():
        with contextlib.suppress(OSError):
            if "reencrypt" in process.command:
                os.kill(process.pid, signal.SIGKILL)
    job.communicate(timeout=30)
    names = [each["name"] for each in json.loads(site.virt_sse("disk", "list", "-o", "json"))]
    assert names.count(disk.name) == 1
    assert not [name for name in names if ".copy-" in name]
    after = site.backend.disks.get(disk.name)
    assert after.state is DiskState.READY
    if runs:
        assert site.state(guest)[0] == libvirt.VIR_DOMAIN_RUNNING
        expect(site, guest, 0x5A)
        write(site, guest, 0x77)
        site.virt_sse("vm", "verify", guest.name)
        assert site.secrets() == [f"virt-sse:{after.id}:service"]
        guest.destroy()
    site.start_paused(guest)
    site.virt_sse("vm", "verify", guest.name)
    if runs:
        expect(site, guest, 0x77)
    guest.destroy()
    site.virt_sse("disk", "check", disk.name)


def test_a_killed_qemu_leaves_the_disk_as_before(site: StageSite) -> None:
    disk = new_disk(site, "raw")
    guest = site.guest(disk)
    site.start_paused(guest)
    write(site, guest, 0x5A)
    site.qemu_io(guest, "flush")
    job = site.popen("virt-sse", "disk", "reencrypt", disk.name, "--max-rate", "256K")
    wait_until(lambda: "<mirror" in site.virsh("dumpxml", guest.name), "QEMU copies", seconds=30)
    os.kill(site.qemu(guest).pid, signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1, said
    assert site.backend.disks.get(disk.name) == disk
    site.start_paused(guest)
    expect(site, guest, 0x5A)
    guest.destroy()


def test_the_agent_goes_on_where_a_killed_agent_stopped(site: StageSite) -> None:
    disk = new_disk(site, "raw")
    guest = site.guest(disk)
    site.virsh("start", guest.name)
    write(site, guest, 0x5A)
    assert "no agent" in site.virt_sse("disk", "reencrypt", disk.name, "--detach", status=1)
    agent = LabAgent(site.host)
    agent.start()
    site.virt_sse("disk", "reencrypt", disk.name, "--detach", "--max-rate", "2M")
    wait_until(lambda: "<mirror" in site.virsh("dumpxml", guest.name), "QEMU copies", seconds=30)
    agent.kill()
    assert "copying" in site.virt_sse("disk", "list")
    with LabAgent(site.host):
        wait_until(lambda: site.backend.disks.get(disk.name).id != disk.id, "copied", seconds=60)
        wait_until(lambda: not disk.path.exists(), "the old image is gone", seconds=30)
        wait_until(lambda: site.backend.host.store.replacements.all() == [], "all is done", seconds=30)
    expect(site, guest, 0x5A)
    site.virt_sse("vm", "verify", guest.name)
    guest.destroy()


def test_a_linux_guest_writes_with_checksums_all_the_time(
    site: StageSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    """Re-encrypted from a single raw to a double qcow2 disk, and back."""
    disk = new_disk(site, "raw", size=16 * M)
    element = site.backend.domains.disk_element(disk.name)
    guest = Guest(
        site.host,
        f"{disk.name}-linux",
        acceleration=acceleration("linux-micro"),
        disks=[element],
        boot=linux_micro,
    )
    guest.start(
        "cat /sys/block/vda/serial; echo; n=0; stop() { echo 3 >/proc/sys/vm/drop_caches\n"
        '[ "$(dd if=/dev/vda bs=64k skip=255 count=1 2>&- | head -c 4)" = AAAA ]; }\n'
        "until stop; do s=$((n % 240)); dd if=/dev/urandom of=/b bs=64k count=1 2>&-\n"
        "md5sum </b >/sum.$s; dd if=/b of=/dev/vda bs=64k seek=$s conv=notrunc,fsync 2>&-\n"
        "n=$((n + 1)); [ $n = 20 ] && echo writing; done\n"
        "bad=0; for f in /sum.*; do s=${f#/sum.}\n"
        "dd if=/dev/vda bs=64k skip=$s count=1 2>&- | md5sum | cmp -s - $f || bad=$((bad + 1)); done\n"
        "echo written $n bad $bad; sleep 600"
    )
    guest.wait_for("writing")
    site.virt_sse("disk", "reencrypt", disk.name, "--format", "qcow2", "--des", site.set)
    site.virt_sse("vm", "verify", guest.name)
    site.qemu_io(guest, "write -P 0x41 16711680 64k")
    said = guest.wait_for("bad ")
    assert re.search(r"written \d+ bad 0$", said.rstrip("\n"), re.MULTILINE)
    assert disk.guest_serial in said
    guest.destroy()


DIE = """\
import os, sys
from {module} import {name}
{name}.{method} = lambda *_: os._exit(9)
from virt_sse.cli.main import main
main()
"""
BEFORE_PIVOT = {"module": "virt_sse.libvirt.block_copy", "name": "BlockCopy", "method": "pivot"}
AFTER_PIVOT = {"module": "virt_sse.store.replacements", "name": "ReplacementStore", "method": "take_over"}


@pytest.mark.parametrize(
    ("moment", "kills_qemu"),
    [(BEFORE_PIVOT, False), (AFTER_PIVOT, False), (AFTER_PIVOT, True)],
    ids=["before", "after", "after, with QEMU"],
)
def test_a_command_killed_within_the_pivot_loses_nothing(
    site: StageSite, moment: dict[str, str], kills_qemu: bool
) -> None:
    """The guest is paused; the domain, or its definition, tells which disk it has."""
    disk = new_disk(site)
    guest = site.guest(disk)
    site.virsh("start", guest.name)
    write(site, guest, 0x5A)
    killed = site.popen(sys.executable, "-c", DIE.format(**moment), "disk", "reencrypt", disk.name)
    said, _ = killed.communicate(timeout=60)
    assert killed.returncode == 9, said
    assert site.state(guest)[0] == libvirt.VIR_DOMAIN_PAUSED
    if kills_qemu:
        os.kill(site.qemu(guest).pid, signal.SIGKILL)
        wait_until(lambda: not guest.is_active(), "libvirt has noticed the end of QEMU")
        site.virsh("start", guest.name)
    site.virt_sse("disk", "list")
    after = site.backend.disks.get(disk.name)
    assert (after.id == disk.id) == (moment is BEFORE_PIVOT)
    assert site.state(guest)[0] == libvirt.VIR_DOMAIN_RUNNING
    expect(site, guest, 0x5A)
    site.virt_sse("vm", "verify", guest.name)
    assert site.secrets() == [f"virt-sse:{after.id}:service"]
    guest.destroy()
    site.virt_sse("disk", "check", disk.name)
