"""Snapshots of the disks of running domains."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest

from support.disk_contents import decrypted
from support.images import contains
from support.stage_site import StageSite, stage_site
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.system.marks import Marks

M = 1 << 20
LARGE = 64 * M


@pytest.fixture(scope="module")
def made_site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector")) as site:
        yield site


@pytest.fixture
def site(made_site: StageSite) -> Iterator[StageSite]:
    yield made_site
    made_site.forget_domains()
    assert made_site.left() == {}


def content(site: StageSite, name: str) -> bytes:
    return decrypted(site.backend, site.backend.disks.get(name))


def snapshot(site: StageSite, *arguments: str) -> dict[str, Any]:
    taken: dict[str, Any] = json.loads(site.virt_sse("snapshot", "create", *arguments, "-o", "json"))
    return taken


@pytest.mark.slow
def test_all_disks_of_a_running_domain_are_snapshot_at_one_point_in_time(site: StageSite) -> None:
    disks = [
        site.single_disk("qcow2"),
        site.single_disk("raw"),
        site.disk("qcow2", size=8 * M + 512),
        site.disk("raw", size=8 * M),
    ]
    guest = site.guest(*disks)
    guest.start()
    for number in range(len(disks)):
        site.qemu_io(guest, f"write -P {0x50 + number} 1M 2M", disk=number)
    taken = snapshot(site, "before", "--domain", guest.name)
    assert taken["domain"] == guest.name
    assert 0 < taken["pause-seconds"] < 5
    for number in range(len(disks)):
        site.qemu_io(guest, "write -P 0x77 1M 1M", disk=number)
    assert "<mirror" not in site.virsh("dumpxml", guest.name)
    assert site.virsh("domstate", guest.name).strip() == "running"
    for number, disk in enumerate(disks):
        name = f"before-vd{'abcd'[number]}"
        made = site.backend.snapshots.get(name)
        assert made.size == disk.size
        assert made.path.stat().st_uid == 0
        assert not contains([made.path], bytes([0x50 + number]) * 64)
        site.backend.disks.check(name)
        found = content(site, name)
        assert len(found) == disk.size
        assert found[M : 3 * M] == bytes([0x50 + number]) * (2 * M)
        site.backend.snapshots.delete(name)
    site.virt_sse("disk", "copy", disks[3].name, "copied", "--path", str(site.host.images / "copied.raw"))
    assert content(site, "copied")[M : 3 * M] == b"\x77" * M + b"\x53" * M
    site.backend.disks.delete("copied")
    guest.destroy()


def copies(site: StageSite, guest: Guest) -> int:
    with contextlib.closing(site.host.connect()) as connection:
        return connection.lookupByName(guest.name).XMLDesc().count("<mirror")


def partial_images(site: StageSite) -> list[str]:
    return [path.name for path in site.host.images.glob(".*")]


class Copying:
    """A guest with two disks, and a slow snapshot of both under way."""

    def __init__(self, site: StageSite) -> None:
        self.site = site
        self.disks = [site.single_disk("raw", size=LARGE), site.disk("raw", size=LARGE)]
        self.guest = site.guest(*self.disks)
        self.guest.start()
        self.command = site.popen("virt-sse", "snapshot", "create", "s", "--domain", self.guest.name)
        for count, target in ((1, "vda"), (2, "vdb")):
            wait_until(lambda count=count: copies(site, self.guest) == count, "a copy has begun")
            site.virsh("blockjob", self.guest.name, target, "--bandwidth", "1")

    def kill(self) -> None:
        (process,) = (each for each in self.site.processes() if "snapshot" in each.command)
        os.kill(process.pid, signal.SIGKILL)
        self.command.communicate(timeout=20)

    def assert_nothing_left(self) -> None:
        assert json.loads(self.site.virt_sse("snapshot", "list", "-o", "json")) == []
        assert partial_images(self.site) == []


@pytest.mark.slow
class TestInterrupted:
    def test_a_killed_command_leaves_a_copy_that_the_next_command_ends(self, site: StageSite) -> None:
        copying = Copying(site)
        copying.kill()
        assert copies(site, copying.guest) == 2
        assert partial_images(site)
        site.virt_sse("disk", "list")
        assert copies(site, copying.guest) == 0
        copying.assert_nothing_left()
        assert site.virsh("domstate", copying.guest.name).strip() == "running"
        site.qemu_io(copying.guest, "write -P 0x5a 0 1M")
        snapshot(site, "s", "--disk", copying.disks[0].name)
        assert content(site, "s")[:M] == b"\x5a" * M
        site.virt_sse("snapshot", "delete", "s")
        copying.guest.destroy()

    def test_other_commands_are_refused_meanwhile_and_the_end_of_qemu_ends_the_snapshot(
        self, site: StageSite
    ) -> None:
        copying = Copying(site)
        disk, guest = copying.disks[0], copying.guest
        assert "as-asked            yes" in site.virt_sse("vm", "verify", guest.name)
        for command in (
            ("snapshot", "create", "t", "--disk", disk.name),
            ("disk", "resize", disk.name, "1G"),
            ("disk", "delete", disk.name),
        ):
            assert re.search("another command|is attached to", site.virt_sse(*command, status=1))
        assert "block job" in site.virsh("detach-disk", guest.name, "vda", "--live", status=1)
        os.kill(site.qemu(guest).pid, signal.SIGKILL)
        said, _ = copying.command.communicate(timeout=60)
        assert copying.command.returncode == 1, said
        assert "Traceback" not in said
        wait_until(lambda: not guest.is_active(), "libvirt knows of the end")
        copying.assert_nothing_left()

    def test_a_guest_left_paused_by_a_killed_command_goes_on(self, site: StageSite) -> None:
        disk = site.single_disk()
        guest = site.guest(disk)
        guest.start()
        with contextlib.closing(site.host.connect()) as connection:
            domain_id = UUID(connection.lookupByName(guest.name).UUIDString())
        marks = Marks(site.backend.host.config.paused_domains)
        marks.add(domain_id)
        site.virsh("suspend", guest.name)
        site.virt_sse("disk", "list")
        assert site.virsh("domstate", guest.name).strip() == "running"
        assert marks.all() == []
        with LabAgent(site.host):
            site.virsh("suspend", guest.name)
            marks.add(domain_id)
            wait_until(lambda: marks.all() == [], "the agent ends the pause")
        assert site.virsh("domstate", guest.name).strip() == "running"
        site.virsh("suspend", guest.name)  # by an operator
        snapshot(site, "s", "--disk", disk.name)
        assert site.virsh("domstate", guest.name).strip() == "paused"
        site.virt_sse("snapshot", "delete", "s")
        guest.destroy()
