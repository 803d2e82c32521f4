"""Snapshots of the disks of running domains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.images import contains
from support.stage_site import StageSite, stage_site
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost
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
    disk = site.backend.disks.get(name)
    with plaintext(disk.path, disk.format, site.backend.host.keys.unwrap_all(disk)) as reader:
        return reader.read(0, reader.size)


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
        site.virt_sse("disk", "check", name)
        found = content(site, name)
        assert len(found) == disk.size
        assert found[M : 3 * M] == bytes([0x50 + number]) * (2 * M)
        site.virt_sse("snapshot", "delete", name)
    guest.destroy()
