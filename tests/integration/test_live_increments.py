"""Incremental snapshots of the disks of running domains, and restoration in place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt_qemu
import pytest

from support.disk_contents import decrypted
from support.images import contains
from support.stage_site import StageSite, stage_site
from support.waiting import wait_until
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.qemu.reading import plaintext

M = 1 << 20


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
    """The content of a snapshot with all snapshots below."""
    host, copy = site.backend.host, site.backend.snapshots.get(name)
    deks, base = host.keys.unwrap_all(copy), unlocked_base(host, copy)
    with plaintext(copy.path, copy.format, deks, base=base) as reader:
        return reader.read(0, reader.size)


def snapshot(site: StageSite, *arguments: str) -> dict[str, Any]:
    command = ("snapshot", "create", *arguments, "--incremental", "-o", "json")
    taken: dict[str, Any] = json.loads(site.virt_sse(*command))
    return taken


def manners(taken: dict[str, Any]) -> list[tuple[str, int | None]]:
    return [(each["manner"], each.get("changed-bytes")) for each in taken["snapshots"]]


def monitor(site: StageSite, guest: Guest, command: str, **arguments: object) -> Any:
    with contextlib.closing(site.host.connect()) as connection:
        request = json.dumps({"execute": command, "arguments": arguments})
        domain = connection.lookupByName(guest.name)
        return json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))["return"]


def bitmaps(site: StageSite, guest: Guest) -> list[list[str]]:
    return [
        sorted(bitmap["name"] for bitmap in device["inserted"].get("dirty-bitmaps", []))
        for device in monitor(site, guest, "query-block")
        if "inserted" in device
    ]


def read_by(site: StageSite, guest: Guest) -> int:
    """Bytes that the guest's QEMU has read from files."""
    words = Path(f"/proc/{site.qemu(guest).pid}/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def delete(site: StageSite, *names: str) -> None:
    for name in names:
        site.backend.snapshots.delete(name)


@pytest.mark.slow
def test_increments_of_all_disks_of_a_running_domain(site: StageSite) -> None:
    disks = [
        site.single_disk("qcow2"),
        site.single_disk("raw", size=8 * M + 512),
        site.disk("qcow2", size=8 * M),
        site.disk("raw", size=8 * M),
    ]
    guest = site.guest(*disks)
    guest.start()
    for number in range(4):
        site.qemu_io(guest, "write -P 0x50 1M 2M", disk=number)
    assert manners(snapshot(site, "a", "--domain", guest.name)) == [("full", None)] * 4
    for number in range(4):
        site.qemu_io(guest, f"write -P {0x60 + number} 2M 128k", disk=number)
        site.qemu_io(guest, "write -z 1M 64k", disk=number)
    taken = snapshot(site, "b", "--domain", guest.name)
    assert manners(taken) == [("bitmap", 192 << 10)] * 4
    assert 0 < taken["pause-seconds"] < 5
    for number in range(4):
        site.qemu_io(guest, "write -P 0x77 0 1M", disk=number)
    assert manners(snapshot(site, "c", "--domain", guest.name)) == [("bitmap", M)] * 4
    assert [len(each) for each in bitmaps(site, guest)] == [2] * 4  # since b, to be pruned, and since c
    assert site.virsh("domstate", guest.name).strip() == "running"
    assert "as-asked            yes" in site.virt_sse("vm", "verify", guest.name)
    for number, target in enumerate(("vda", "vdb", "vdc", "vdd")):
        found = content(site, f"b-{target}")
        assert len(found) == disks[number].size
        assert disks[number].format is DiskFormat.RAW or found[:M] == bytes(M)
        assert found[M : 3 * M] == (
            bytes(64 << 10)
            + b"\x50" * (M - (64 << 10))
            + bytes([0x60 + number]) * (128 << 10)
            + b"\x50" * (M - (128 << 10))
        )
        made = site.backend.snapshots.get(f"b-{target}")
        assert made.path.stat().st_uid == 0
        assert not contains([made.path], bytes([0x60 + number]) * 64)
    assert content(site, "c-vdd")[:M] == b"\x77" * M
    guest.destroy()
    guest.start()  # no bitmap any more
    site.qemu_io(guest, "write -P 0x78 4M 64k", disk=0)
    assert manners(snapshot(site, "d", "--disk", disks[0].name)) == [("comparison", 64 << 10)]
    assert content(site, "d")[4 * M : 4 * M + (64 << 10)] == b"\x78" * (64 << 10)
    guest.destroy()
    delete(site, "d", *(f"{point}-vd{letter}" for point in "cba" for letter in "abcd"))


@pytest.mark.slow
def test_an_increment_reads_what_changed(site: StageSite) -> None:
    disk = site.single_disk("raw", size=64 * M)
    guest = site.guest(disk)
    guest.start()
    snapshot(site, "a", "--disk", disk.name)
    site.qemu_io(guest, "write -P 0x11 10M 20M")
    before = read_by(site, guest)
    assert manners(snapshot(site, "b", "--disk", disk.name)) == [("bitmap", 20 * M)]
    assert 20 * M <= read_by(site, guest) - before < 22 * M
    guest.destroy()
    delete(site, "b", "a")


@pytest.mark.slow
def test_a_killed_increment_leaves_nothing_and_the_next_is_right(site: StageSite) -> None:
    disk = site.single_disk("qcow2", size=64 * M)
    guest = site.guest(disk)
    guest.start()
    snapshot(site, "a", "--disk", disk.name)
    site.qemu_io(guest, "write -P 0x22 0 64M")
    command = site.popen("virt-sse", "snapshot", "create", "b", "--disk", disk.name, "--incremental")
    wait_until(lambda: len(monitor(site, guest, "query-jobs")) == 1, "the copy has begun")
    (process,) = (each for each in site.processes() if "snapshot" in each.command)
    os.kill(process.pid, signal.SIGKILL)
    command.communicate(timeout=20)
    site.virt_sse("disk", "list")
    assert monitor(site, guest, "query-jobs") == []
    assert len(bitmaps(site, guest)[0]) == 1
    assert [path.name for path in site.host.images.glob(".*")] == []
    taken = snapshot(site, "b", "--disk", disk.name)
    assert manners(taken) == [("bitmap", 64 * M)]
    assert content(site, "b") == b"\x22" * (64 * M)
    assert bitmaps(site, guest) != [[]]
    site.virt_sse("disk", "resize", disk.name, "32M", "--shrink")
    assert bitmaps(site, guest) == [
        []
    ]  # else clusters that are cut off and come back would pass as unchanged
    guest.destroy()
    delete(site, "b", "a")


def restored_in_place(site: StageSite, disk: Disk) -> Disk:
    site.virt_sse("snapshot", "restore", "a", disk.name, "--in-place")
    return site.backend.disks.get(disk.name)


@pytest.mark.slow
def test_a_disk_is_restored_in_place_and_keeps_its_domain(site: StageSite) -> None:
    disk = site.disk("qcow2", size=8 * M)
    guest = site.guest(disk)
    guest.start()
    snapshot(site, "base", "--disk", disk.name)
    site.qemu_io(guest, "write -P 0x33 1M 1M")
    assert manners(snapshot(site, "a", "--disk", disk.name)) == [("bitmap", M)]
    site.qemu_io(guest, "write -P 0x44 1M 1M")
    said = site.virt_sse("snapshot", "restore", "a", disk.name, "--in-place", status=1)
    assert f"domain {guest.name} runs with disk" in said.replace("'", "")
    guest.destroy()
    site.virt_sse("snapshot", "restore", "a", disk.name, "--in-place", "--dry-run")
    assert decrypted(site.backend, disk)[M : 2 * M] == b"\x44" * M
    new = restored_in_place(site, disk)
    assert (new.name, new.path, new.set_id, new.size) == (disk.name, disk.path, disk.set_id, disk.size)
    assert new.guest_serial == disk.guest_serial
    assert new.id != disk.id
    assert decrypted(site.backend, new)[M : 2 * M] == b"\x33" * M
    site.virsh("start", guest.name)  # as defined by now
    site.qemu_io(guest, "write -P 0x55 1M 64k")
    assert manners(snapshot(site, "b", "--disk", disk.name)) == [("comparison", 64 << 10)]
    names = [
        each["name"]
        for each in json.loads(site.virt_sse("snapshot", "list", "--disk", disk.name, "-o", "json"))
    ]
    assert sorted(names) == ["a", "b", "base"]
    guest.destroy()
    assert decrypted(site.backend, restored_in_place(site, new))[M : 2 * M] == b"\x33" * M
    other = site.single_disk()
    assert "is no snapshot of disk" in site.virt_sse(
        "snapshot", "restore", "a", other.name, "--in-place", status=1
    )
    delete(site, "b", "a", "base")
