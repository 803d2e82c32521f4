"""An escaped guest, a process of QEMU's user, at the NBD sockets of other domains' disks."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stage_site import StageSite, owner, stage_site_fixtures
from support.waiting import wait_until
from virt_sse.domains.settings import VmChanges
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.host import QEMU_USER
from virt_sse.model.disks import Disk
from virt_sse.model.layers import HostCaching
from virt_sse.stages.locked_process import LockedProcess
from virt_sse.stages.record import RECORD_NAME

M = 1 << 20
ATTACK = """\
import os, pwd, select, socket, sys
name = pwd.getpwuid(int(sys.argv[1])).pw_name
os.initgroups(name, int(sys.argv[2])); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))
print("ready", flush=True)
tried = 0
while not select.select([0], [], [], 0)[0]:  # until standard input is closed
    for path in sys.argv[3:]:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        try:
            client.connect(path)
            tried += 1
            if client.recv(1): print("served", path, flush=True)
        except OSError: pass
        finally: client.close()
        if tried == 1: print("connected", flush=True); tried += 1
"""


running_site, site = stage_site_fixtures()


@contextlib.contextmanager
def attacked(site: StageSite, *disks: Disk) -> Iterator[None]:
    """An escaped guest that connects to the disks' sockets all the time; asserts that it is never served."""
    user = pwd.getpwnam(QEMU_USER)
    sockets = [str(site.backend.host.stages.guest_socket(disk.id)) for disk in disks]
    command = ["python3", "-I", "-S", "-c", ATTACK, str(user.pw_uid), str(user.pw_gid), *sockets]
    attack = subprocess.Popen(
        site.host.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert attack.stdin
    assert attack.stdout
    try:
        assert attack.stdout.readline() == "ready\n"
        yield
    finally:
        attack.stdin.close()  # a kill would end nsenter only
        said = attack.stdout.read()  # communicate() would miss lines that readline() has read ahead
        attack.wait(timeout=60)
        attack.stdout.close()
    assert said == "connected\n", said


def gate(site: StageSite, disk: Disk) -> LockedProcess:
    return LockedProcess(site.backend.host.config.stage_directory / str(disk.id) / "gate")


def test_domains_start_together_and_are_used_under_attack(site: StageSite) -> None:
    disks = [site.disk("qcow2", size=M), site.disk("raw", size=M)]
    guests = [site.guest(disk) for disk in disks]
    with attacked(site, *disks):
        starts = [site.popen("virsh", "start", guest.name, "--paused") for guest in guests]
        for start in starts:
            said = start.communicate(timeout=60)[0]
            assert start.returncode == 0, said
        for guest in guests:
            assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096")
            assert "failed" not in site.qemu_io(guest, "read -P 0x5a 0 4096")
        for disk in disks:
            wait_until(lambda disk=disk: gate(site, disk).output(), "the gate has refused a process")
            (refused,) = gate(site, disk).output().splitlines()
            assert f"of user {pwd.getpwnam(QEMU_USER).pw_uid}, '" in refused
        for guest in guests:
            guest.destroy()
    for disk in disks:
        site.backend.disks.check(disk.name)


@pytest.mark.parametrize("caching", [HostCaching.READ_ONLY, HostCaching.READ_WRITE])
@pytest.mark.parametrize("double", [False, True])
def test_a_cached_disk_is_used_under_attack(site: StageSite, double: bool, caching: HostCaching) -> None:
    disk = site.disk("qcow2", size=M) if double else site.single_disk("qcow2", size=M)
    guest = site.guest(disk)
    site.backend.vms.update(guest.name, VmChanges(encryption_at_host=True, caching={"vda": caching}))
    with attacked(site, disk):
        site.start_paused(guest)
        assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096")
    guest.destroy()


def test_a_killed_gate_is_replaced_under_the_guest(site: StageSite) -> None:
    disk = site.disk("raw", size=M)
    guest = site.guest(disk)
    with LabAgent(site.host):
        site.start_paused(guest)
        pid = gate(site, disk).pid()
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gate(site, disk).pid() not in (None, pid), "the agent has started a new gate")
        assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096")
        with attacked(site, disk):
            wait_until(lambda: "of user" in gate(site, disk).output(), "the new gate refuses")
        guest.destroy()


def test_an_escaped_guest_does_not_hold_up_a_domain_with_an_unreachable_gate(site: StageSite) -> None:
    """The gate is killed before QEMU connects: the start fails, the next start works."""
    disk = site.disk("raw", size=M)
    guest = site.guest(disk)
    start = site.popen("virsh", "start", guest.name, "--paused")
    wait_until(lambda: gate(site, disk).pid(), "the gate runs")
    os.kill(gate(site, disk).pid() or 0, signal.SIGKILL)
    start.communicate(timeout=60)
    if guest.is_active():
        guest.destroy()
    assert site.left() == {}
    site.start_paused(guest)
    assert Path(site.backend.host.stages.guest_socket(disk.id)).is_socket()


@pytest.mark.parametrize("with_gate", [True, False])
def test_the_processes_of_a_damaged_record_end_with_the_domain(site: StageSite, with_gate: bool) -> None:
    disk, cached = site.disk("raw", size=M), site.single_disk("raw", size=M)
    guest = site.guest(disk, cached)
    caching = {"vdb": HostCaching.READ_ONLY}
    site.backend.vms.update(guest.name, VmChanges(encryption_at_host=True, caching=caching))
    site.start_paused(guest)
    for each in (disk, cached):
        (site.backend.host.config.stage_directory / str(each.id) / RECORD_NAME).write_text("{")
        if not with_gate:
            os.kill(gate(site, each).pid() or 0, signal.SIGKILL)
    guest.destroy()
    assert site.left() == {}
    assert [owner(disk), owner(cached)] == [0, 0]
    site.start_paused(guest)
    guest.destroy()


def test_a_hot_plugged_disk_is_for_its_own_domain_alone(site: StageSite) -> None:
    disk, plugged = site.disk("raw", size=M), site.disk("qcow2", size=M)
    guest = site.guest(disk)
    site.start_paused(guest)
    with attacked(site, disk, plugged):
        site.virt_sse("disk", "attach", plugged.name, guest.name)
        assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096", disk=1)
        assert "failed" not in site.qemu_io(guest, "read -P 0x5a 0 4096", disk=1)
        wait_until(lambda: gate(site, plugged).output(), "the gate has refused a process")
    guest.destroy()
    site.backend.disks.check(plugged.name)


def test_nothing_is_left_if_qemu_never_comes(site: StageSite) -> None:
    """QEMU ends at an argument that it does not know, after the hook has served the disks."""
    disk, cached = site.disk("raw", size=M), site.single_disk("raw", size=M)
    guest = site.guest(disk, cached)
    caching = {"vdb": HostCaching.READ_ONLY}
    site.backend.vms.update(guest.name, VmChanges(encryption_at_host=True, caching=caching))
    uses = site.backend.host.freshness.carried_by(disk.path).uses or 0
    broken = site.host.directory / f"{disk.name}.xml"
    qemu = "<qemu:commandline><qemu:arg value='-no-such-option'/></qemu:commandline>"
    xml = site.virsh("dumpxml", "--inactive", guest.name)
    namespace = "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' "
    broken.write_text(xml.replace("<domain ", namespace, 1).replace("</domain>", f"{qemu}</domain>"))
    site.virsh("define", broken)
    assert "no-such-option" in site.virsh("start", guest.name, "--paused", status=1)
    assert site.backend.host.freshness.carried_by(disk.path).uses == uses + 2, "its use began and ended"
    assert site.left() == {}
    assert [owner(disk), owner(cached)] == [0, 0]
    broken.write_text(xml)
    site.virsh("define", broken)
    site.start_paused(guest)
    guest.destroy()
