"""Storage pools of libvirt with images of virt-sse."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import libvirt
import pytest

from support.images import require
from support.loop_devices import loop_device
from support.stage_site import StageSite, stage_site_fixtures
from virt_sse.lab.guests import Guest

M = 1 << 20

running_site, site = stage_site_fixtures()


def volume_xml(pool: str, volume: str, image_format: str, encryption: str = "") -> str:
    return (
        f"<disk type='volume'><driver name='qemu' type='{image_format}'/>"
        f"<source pool='{pool}' volume='{volume}'>{encryption}</source>"
        "<target dev='vda' bus='virtio'/></disk>"
    )


def guest(site: StageSite, element: str) -> Guest:
    name = f"v{uuid.uuid4().hex[:8]}"
    return Guest(site.host, name, acceleration=site.acceleration, disks=[element])


@pytest.mark.slow
def test_volumes_of_a_pool_are_refused_or_encrypted(site: StageSite) -> None:
    pool = f"p{uuid.uuid4().hex[:8]}"
    folder: Path = site.host.images / pool
    folder.mkdir()
    site.virsh("pool-create-as", pool, "dir", "--target", folder)
    site.virt_sse("disk", "create", pool, "--size", "4M", "--pool", pool)
    image = f"{pool}.qcow2"
    site.virsh("pool-refresh", pool)
    assert image in site.virsh("vol-list", pool)
    assert "<encryption format='luks'" in site.virsh("vol-dumpxml", image, "--pool", pool)

    with pytest.raises(libvirt.libvirtError, match="without its key"):
        guest(site, volume_xml(pool, image, "qcow2")).start()
    disk = site.backend.disks.get(pool)
    secret = f"<secret type='passphrase' usage='virt-sse:{disk.id}:{disk.deks[0].slot}'/>"
    keyed = volume_xml(pool, image, "qcow2", f"<encryption format='luks'>{secret}</encryption>")
    with pytest.raises(libvirt.libvirtError, match="by a volume of a storage pool"):
        guest(site, keyed).start()

    site.virsh("vol-create-as", pool, "plain.raw", str(M), "--format", "raw")
    stopped = guest(site, volume_xml(pool, "plain.raw", "raw"))
    stopped.define()
    site.virt_sse("vm", "encrypt", stopped.name, "--directory", folder)
    assert f"usage='virt-sse:{site.backend.disks.get(f'{stopped.name}-vda').id}" in site.virsh(
        "dumpxml", stopped.name
    )
    site.virsh("vol-delete", image, "--pool", pool)
    assert "missing" in site.virt_sse("disk", "list")
    site.forget_domains()
    site.backend.disks.delete(pool)
    for copy in site.backend.host.store.replacements.all():
        site.backend.host.store.replacements.remove(copy)
    site.virsh("pool-destroy", pool)


@pytest.mark.slow
def test_a_pool_that_libvirt_mounts_has_disks(site: StageSite) -> None:
    require("mke2fs")
    pool = f"p{uuid.uuid4().hex[:8]}"
    folder, below = site.host.images / pool, site.host.directory / pool
    folder.mkdir()
    below.touch()
    os.truncate(below, 32 * M)
    with loop_device(below) as device:
        subprocess.run(["mke2fs", "-q", "-t", "ext4", device], check=True)
        site.virsh("pool-create-as", pool, "fs", "--source-dev", device, "--target", folder)
        assert str(folder) in site.run("cat", "/proc/mounts")
        site.virt_sse("disk", "create", pool, "--size", "1M", "--pool", pool)
        assert f"{pool}.qcow2" in site.virsh("vol-list", pool)
        domain = guest(site, site.virt_sse("disk", "xml", pool))
        domain.define()
        site.start_paused(domain)
        domain.destroy()
        domain.undefine()
        site.virt_sse("disk", "delete", pool, "--purge", "--yes")
        site.virsh("pool-destroy", pool)
        assert str(folder) not in site.run("cat", "/proc/mounts")
