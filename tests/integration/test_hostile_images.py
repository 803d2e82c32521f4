"""Images with hostile headers on a lab host: no guest gets the disk, and nobody touches the named files."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from support.hostile_images import Canary, Header
from support.stage_site import StageSite, stage_site
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.model.disks import Disk

M = 1 << 20
QCOW2_CHANGES = ["backing file", "data file", "raw data file", "iterations of a keyslot"]
EMPTY = "  <backingStore />\n"
AT_ONCE = 20.0
"""Seconds, on a busy machine; a header with many iterations would take minutes."""


@pytest.fixture(scope="module")
def running_site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector")) as site:
        yield site


@pytest.fixture
def site(running_site: StageSite) -> Iterator[StageSite]:
    disks = running_site.backend.disks
    before = {disk.id for disk in disks.all()}
    yield running_site
    running_site.forget_domains()
    for disk in disks.all():
        if disk.id not in before:  # other tests on the host rotate the keys of all of its disks
            disk.path.unlink(missing_ok=True)
            disks.erase(disk)


@pytest.fixture
def canary(site: StageSite, name: str) -> Canary:
    return Canary(site.host.images / f"{name}.canary")


def defined(site: StageSite, disk: Disk, *, states_backing: bool = True) -> Guest:
    """A defined guest with *disk*; its ``<disk>`` element says that there is no backing file, or does not."""
    element = site.backend.domains.disk_element(disk.name)
    assert EMPTY in element
    guest = Guest(
        site.host,
        disk.name,
        acceleration=site.acceleration,
        disks=[element if states_backing else element.replace(EMPTY, "")],
    )
    guest.define()
    return guest


def assert_not_served(site: StageSite, guest: Guest, reason: str, canary: Canary) -> None:
    began = time.monotonic()
    assert reason in site.virsh("start", guest.name, "--paused", status=1)
    assert time.monotonic() - began < AT_ONCE
    canary.assert_untouched()
    assert not guest.is_active()
    assert site.left() == {}
    said = site.virt_sse("vm", "verify", guest.name, "--output", "json", status=1)
    document, _ = json.JSONDecoder().raw_decode(said)
    assert any(reason in problem for disk in document["disks"] for problem in disk["problems"]), document
    canary.assert_untouched()


@pytest.mark.parametrize("states_backing", [True, False])
@pytest.mark.parametrize("change", QCOW2_CHANGES)
def test_a_domain_on_a_hostile_image_does_not_start(
    site: StageSite, canary: Canary, change: str, states_backing: bool
) -> None:
    disk = site.single_disk("qcow2")
    guest = defined(site, disk, states_backing=states_backing)
    reason = Header(disk).change(change, canary.path)
    assert_not_served(site, guest, reason, canary)


def test_many_iterations_in_a_raw_image_do_not_hang_a_start(site: StageSite, canary: Canary) -> None:
    disk = site.single_disk("raw")
    guest = defined(site, disk)
    reason = Header(disk).change("iterations of a keyslot", canary.path)
    assert_not_served(site, guest, reason, canary)


@pytest.mark.parametrize(
    ("image_format", "change"),
    [*(("qcow2", change) for change in QCOW2_CHANGES), ("raw", "iterations of a keyslot")],
)
@pytest.mark.parametrize("is_inner", [True, False])
def test_a_domain_on_a_hostile_double_disk_does_not_start(
    site: StageSite, canary: Canary, image_format: str, change: str, is_inner: bool
) -> None:
    disk = site.disk(image_format, size=8 * M)
    guest = defined(site, disk)
    outer = [site.dek(disk, "infrastructure")] if is_inner else []
    reason = Header(disk, outer).change(change, canary.path)
    assert_not_served(site, guest, reason, canary)


def test_a_hostile_image_is_not_attached_to_a_running_domain(site: StageSite, canary: Canary) -> None:
    guest, disk = site.guest(site.single_disk("qcow2")), site.single_disk("qcow2")
    site.start_paused(guest)
    reason = Header(disk).change("backing file", canary.path)
    assert reason in site.virt_sse("disk", "attach", disk.name, guest.name, status=1)
    canary.assert_untouched()


def test_update_states_that_there_is_no_backing_file(site: StageSite) -> None:
    guest = defined(site, site.single_disk("qcow2"), states_backing=False)
    assert "<backingStore" not in site.virsh("dumpxml", guest.name, "--inactive")
    site.virt_sse("vm", "update", guest.name, "--encryption-at-host", "on")
    assert "<backingStore/>" in site.virsh("dumpxml", guest.name, "--inactive")


@pytest.mark.parametrize("states_backing", [True, False])
def test_libvirt_follows_names_in_headers_only_without_backing_store(
    site: StageSite, canary: Canary, name: str, states_backing: bool
) -> None:
    """On a foreign disk: why ours have ``<backingStore/>``. A race with the storage then changes nothing."""
    image = site.host.images / f"{name}.qcow2"
    backing = ["-b", canary.path, "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "1M"], check=True)
    canary = Canary(canary.path)
    element = (
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
        f"<source file='{image}'/>{EMPTY if states_backing else ''}<target dev='vda' bus='virtio'/></disk>"
    )
    guest = Guest(site.host, name, acceleration=site.acceleration, disks=[element])
    guest.define()
    site.start_paused(guest)
    if states_backing:
        canary.assert_untouched()
    else:
        with pytest.raises(AssertionError):
            canary.assert_untouched()
