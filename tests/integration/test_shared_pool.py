"""A pool on a distributed file system that two hosts mount: a disk has one host at a time, and migrates."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import libvirt
import pytest

from support.gluster import GlusterVolume, gluster_volume
from support.migration_site import MigrationHost, MigrationSite, MovingGuest, migration_site_fixture
from support.writing_guest import newest_block
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import QEMU_GROUP, QEMU_USER
from virt_sse.lab.recipes import LinuxMicro

site = migration_site_fixture("site")


@contextlib.contextmanager
def pool(host: MigrationHost, volume: GlusterVolume, target: Path) -> Iterator[None]:
    """libvirt on *host* mounts the volume at *target*, as a pool."""
    logs = "/var/log/glusterfs"  # of mount.glusterfs
    host.host.run(["mount", "-t", "tmpfs", "none", logs], check=True)
    source = ("--source-host", volume.address, "--source-path", volume.name, "--source-format", "glusterfs")
    host.host.virsh("pool-create-as", "shared", "netfs", *source, "--target", target)
    try:
        yield
    finally:
        host.host.virsh("pool-destroy", "shared")
        host.host.run(["umount", logs], check=True)


@pytest.fixture(scope="module", autouse=True)
def shared(site: MigrationSite) -> Iterator[None]:
    """The site's images are in the pool ``shared`` of both hosts."""
    with TemporaryDirectory(prefix="virt-sse-") as folder, contextlib.ExitStack() as stack:
        volume = stack.enter_context(gluster_volume(Path(folder)))
        stack.enter_context(volume.mounted(site.images))
        for host in (site.a, site.b):
            stack.enter_context(pool(host, volume, site.images))
        shutil.chown(site.images, QEMU_USER, QEMU_GROUP)
        yield
        site.forget_domains()


@pytest.mark.slow
def test_a_disk_in_a_pool_of_two_hosts_has_one_host_and_migrates(
    site: MigrationSite,
    acceleration: Callable[[str], Acceleration],
    linux_micro: LinuxMicro,
) -> None:
    disk = site.disk("raw", encryption_set=site.double.name)
    for host in (site.a, site.b):
        host.host.virsh("pool-refresh", "shared")
        assert disk.path.name in host.host.virsh("vol-list", "shared").stdout
    linux = acceleration("linux-micro")
    guest = MovingGuest(site, disk, linux, linux_micro)
    guest.run()
    element = site.b.backend.domains.disk_element(disk.name)
    rival = Guest(site.b.host, f"{disk.name}-rival", acceleration=linux, disks=[element])
    with pytest.raises(libvirt.libvirtError, match="on host"):
        rival.start()
    for source, target in ((site.a, site.b), (site.b, site.a)):
        site.migrate(guest, source, target)
        guest.await_writes()
        assert source.secrets() == []
        assert source.backend.host.stages.records() == []
    guest.destroy()
    assert newest_block(site.content(disk)) >= guest.acknowledged
