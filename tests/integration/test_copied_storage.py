"""Migration between hosts that share a store and no images: the content goes into disks with other keys."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import libvirt
import pytest

from support.migration_site import MigrationSite, MovingGuest, migration_site_fixture
from support.migration_tls import TLS, migration_tls
from support.waiting import wait_until
from support.writing_guest import newest_block
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import Disk, DiskState

Accelerate = Callable[[str], Acceleration]

COPYING = ("--copy-storage-all", *TLS)
MOVING = ("--persistent", "--undefinesource", *COPYING)

running_site = migration_site_fixture("running_site")


@pytest.fixture(scope="module")
def site_with_tls(running_site: MigrationSite) -> Iterator[MigrationSite]:
    with migration_tls([running_site.a.host, running_site.b.host]):
        yield running_site


@pytest.fixture
def site(site_with_tls: MigrationSite) -> Iterator[MigrationSite]:
    yield site_with_tls
    site_with_tls.forget_domains()
    for host in (site_with_tls.a, site_with_tls.b):
        assert host.secrets() == []
        wait_until(lambda host=host: host.leases() == [], "the leases are given back")


def state(site: MigrationSite, disk: Disk) -> DiskState:
    return site.a.backend.host.store.get(str(disk.id)).state


def job(site: MigrationSite, guest: Guest) -> str:
    """The job of the guest's domain on host a, in virsh's words."""
    return site.a.host.virsh("domjobinfo", guest.name).stdout


def assert_refused(site: MigrationSite, guest: Guest, reason: str, *options: str) -> None:
    """The migration to host b is refused with the reason at the source; the guest runs on there alone."""
    keys = site.a.secrets()
    done = site.migrate(guest, site.a, site.b, *options, check=False)
    assert done.returncode == 1
    assert reason in done.stderr, done.stderr
    assert site.a.state(guest) == libvirt.VIR_DOMAIN_RUNNING
    assert site.a.secrets() == keys
    assert site.b.state(guest) is None
    assert site.b.secrets() == []


def volume_key_digest(disk: Disk) -> bytes:
    """The digest of the volume key in the LUKS header (LUKS1 On-Disk Format 1.2.3: offset 112)."""
    content = disk.path.read_bytes()
    header = content.index(b"LUKS\xba\xbe\x00\x01")
    return content[header + 112 : header + 132]


def test_the_content_goes_into_a_disk_with_other_keys(
    site: MigrationSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    disk = site.disk()
    guest = MovingGuest(site, disk, acceleration("linux-micro"), linux_micro)
    guest.run()
    path = site.b.host.images / f"{disk.name}.received"
    site.b.virt_sse("disk", "receive", disk.name, "--path", path, "--name", f"{disk.name}.b")
    target = site.b.backend.host.store.get(f"{disk.name}.b")
    slow = site.command(
        guest, site.a, site.b, "--bandwidth", "1", *COPYING, serial=site.serial(guest, site.b)
    )
    with subprocess.Popen(slow, env=site.a.host.environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            wait_until(lambda: "Memory processed" in job(site, guest), "the guest's memory is sent")
            assert "is attached" in site.b.virt_sse("disk", "delete", target.name, "--yes", status=1)
            site.a.host.virsh("domjobabort", guest.name)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 1, said
    guest.await_writes()
    assert site.b.secrets() == []
    assert state(site, target) is DiskState.RECEIVING
    site.migrate(guest, site.a, site.b, *MOVING)
    guest.await_writes()
    assert site.b.secrets() == [f"virt-sse:{target.id}:service"]
    assert site.a.secrets() == []
    assert disk.id not in site.a.leases()
    wait_until(lambda: state(site, target) is DiskState.READY, "the disk is ready")
    guest.destroy()
    newest = newest_block(site.content(target))
    assert newest >= guest.acknowledged
    assert newest > newest_block(site.content(disk))
    keys, store = site.a.backend.host.keys, site.a.backend.host.store
    assert keys.unwrap_all(store.get(disk.name)) != keys.unwrap_all(store.get(target.name))
    assert volume_key_digest(disk) != volume_key_digest(target)
    defined = DomainDefinition.parse(site.b.host.virsh("dumpxml", guest.name, "--inactive").stdout)
    assert [(use.disk_id, use.source) for use in defined.our_disks] == [(target.id, target.path)]


def test_disks_with_storage_processes_are_copied(site: MigrationSite, acceleration: Accelerate) -> None:
    sets = (site.double.name, site.placed_below.name)
    disks = [site.disk("raw"), *(site.disk(encryption_set=each) for each in sets)]
    elements = [
        site.a.backend.domains.disk_element(disk.name, target=f"vd{letter}")
        for disk, letter in zip(disks, "abc", strict=True)
    ]
    guest = Guest(site.a.host, disks[0].name, acceleration=acceleration("boot-sector"), disks=elements)
    guest.define()
    caching = ("--disk-caching", "vda=ReadWrite", "--disk-caching", "vdb=ReadOnly")
    site.a.virt_sse("vm", "update", guest.name, "--encryption-at-host", "on", *caching)
    site.a.host.virsh("start", guest.name)
    wait_until(lambda: "done" in guest.serial, "the guest has written")
    prepare, images = site.b.backend.receiving.prepare, site.b.host.images
    targets = [prepare(disk.name, place=images / f"{disk.name}.received") for disk in disks]
    assert_refused(site, guest, "and the migration does not copy them", *TLS)
    assert_refused(site, guest, "would cross the network in plaintext", "--copy-storage-all", *TLS[1:])
    site.b.agent.kill()
    site.migrate(guest, site.a, site.b, *MOVING)
    assert site.b.state(guest) == libvirt.VIR_DOMAIN_RUNNING
    assert {state(site, each) for each in targets} == {DiskState.RECEIVING}
    site.b.agent.start()
    wait_until(lambda: {state(site, each) for each in targets} == {DiskState.READY}, "the disks are ready")
    site.b.virt_sse("vm", "verify", guest.name)
    site.b.host.virsh("destroy", guest.name)
    for disk, target in zip(disks, targets, strict=True):
        assert site.content(target) == site.content(disk)
