"""Disks with iothreads, in stopped and running domains."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import libvirt
import pytest

from support.stage_site import StageSite, stage_site
from virt_sse.errors import LibvirtError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.libvirt.iothreads import IothreadChoice


@pytest.fixture(scope="module")
def site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector"), "") as site:
        yield site
        site.forget_domains()


def served(site: StageSite, guest: Guest, *options: str) -> tuple[list[str], dict[str, str]]:
    """Of a definition: the numbers of the iothreads, and the iothread of each disk with one."""
    xml = site.virsh("dumpxml", guest.name, *options)
    ids = re.findall(r"<iothread id='(\d+)'", xml)
    if count := re.search(r"<iothreads>(\d+)<", xml):  # libvirt numbers the others from 1
        ids = ids or [str(number + 1) for number in range(int(count[1]))]
    disks = re.findall(r"<disk .*?</disk>", xml, re.DOTALL)
    found = {}
    for disk in disks:
        if number := re.search(r"<driver [^>]*iothread='(\d+)'", disk):
            target = re.search(r"<target dev='(\w+)'", disk)
            assert target
            found[target[1]] = number[1]
    return ids, found


def test_disks_get_iothreads_before_and_while_the_domain_runs(site: StageSite) -> None:
    """A double disk and a single disk; the guest's device answers through its iothread."""
    guest = site.guest(site.single_disk("raw"))
    attach = ("disk", "attach", site.disk("raw", size=8 << 20).name, guest.name, "--iothread")
    assert "no iothread 1" in site.virt_sse(*attach, "1", status=2)
    assert "invalid iothread" in site.virt_sse(*attach, "one", status=2)
    assert "only virtio disks" in site.virt_sse(*attach, "new", "--target", "sdb", status=2)
    assert served(site, guest, "--inactive") == ([], {})
    site.virt_sse(*attach, "new")
    assert served(site, guest, "--inactive") == (["1"], {"vdb": "1"})

    site.start_paused(guest)
    third, fourth = site.single_disk(), site.single_disk("raw")
    site.virt_sse("disk", "attach", third.name, guest.name, "--iothread", "1")
    site.virt_sse("disk", "attach", fourth.name, guest.name, "--iothread", "new")
    expected = {"vdb": "1", "vdc": "1", "vdd": "2"}
    for options in ((), ("--inactive",)):
        assert served(site, guest, *options) == (["1", "2"], expected)
    site.qemu_io(guest, "write -P 7 0 1M", disk=1)
    assert "read 1048576/1048576" in site.qemu_io(guest, "read -P 7 0 1M", disk=1)
    assert site.virt_sse("vm", "verify", guest.name)

    site.virsh("iothreadadd", guest.name, "7", "--live", "--config")
    site.backend.hotplug.attach(site.single_disk().name, guest.name, iothread=IothreadChoice.AUTO)
    for options in ((), ("--inactive",)):
        assert served(site, guest, *options) == (["1", "2", "7"], {**expected, "vde": "7"})


def test_a_refused_attach_leaves_no_iothread(site: StageSite, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, disk = site.guest(site.single_disk("raw")), site.single_disk()
    site.start_paused(guest)

    def refuse(*_: object) -> None:
        raise libvirt.libvirtError("no device today")

    monkeypatch.setattr(libvirt.virDomain, "attachDeviceFlags", refuse)
    with pytest.raises(LibvirtError, match="no device today"):
        site.backend.hotplug.attach(disk.name, guest.name, iothread=IothreadChoice.NEW)
    for options in ((), ("--inactive",)):
        assert served(site, guest, *options) == ([], {})
    monkeypatch.undo()
    site.backend.hotplug.attach(disk.name, guest.name, iothread=IothreadChoice.NEW)
    assert served(site, guest) == (["1"], {"vdb": "1"})


def test_a_disk_missing_in_a_definition_gets_the_same_iothread_there(site: StageSite) -> None:
    guest, disk = site.guest(site.single_disk("raw")), site.single_disk()
    site.start_paused(guest)
    site.virt_sse("disk", "attach", disk.name, guest.name, "--iothread", "new")
    site.virsh("detach-disk", guest.name, "vdb", "--config")
    assert "with other options" in site.virt_sse("disk", "attach", disk.name, guest.name, status=1)
    site.virt_sse("disk", "attach", disk.name, guest.name, "--iothread", "auto")
    for options in ((), ("--inactive",)):
        assert served(site, guest, *options) == (["1"], {"vdb": "1"})
