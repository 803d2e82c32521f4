"""Disks in Ceph: RBD images of a cluster of the lab."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from support.stage_site import CONFIG, StageSite, show, stage_site
from support.waiting import wait_until
from support.writing_guest import WritingGuest, newest_block
from virt_sse.errors import DiskInUseError, ImageError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.ceph import LabCeph
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.qemu import rbd_image
from virt_sse.qemu.reading import plaintext
from virt_sse.system.rbd_names import is_rbd

pytestmark = pytest.mark.slow

M = 1 << 20
USER = "virt-sse"


@pytest.fixture(scope="module", name="running_site")
def _running_site(
    lab_host: LabHost, acceleration: Callable[[str], Acceleration], lab_ceph: LabCeph
) -> Iterator[StageSite]:
    options = f"[ceph]\nmonitors = ['{lab_ceph.monitor}']\nkeyring = '{lab_ceph.keyring(USER)}'\n"
    with stage_site(lab_host, acceleration("boot-sector"), CONFIG + options) as site:
        yield site
        for disk in site.backend.host.store.all():  # other tests' hosts have no Ceph
            if is_rbd(disk.path):
                site.backend.host.store.remove(disk.id)


@pytest.fixture(name="site")
def _site(running_site: StageSite) -> Iterator[StageSite]:
    yield running_site
    running_site.forget_domains()
    assert running_site.left() == {}


def place(ceph: LabCeph) -> Path:
    return Path(f"rbd:{ceph.pool}/{uuid.uuid4().hex[:8]}")


def create(site: StageSite, path: Path, encryption_set: str | None = None) -> Disk:
    new = NewDisk(
        name=f"c{path.name}", size=8 * M, format=DiskFormat.RAW, place=path, encryption_set=encryption_set
    )
    return site.backend.disks.create(new)


def rbd_disk(path: Path, ceph: LabCeph) -> str:
    """The ``<disk>`` element of an RBD image without encryption."""
    host, _, port = ceph.monitor.partition(":")
    return (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='rbd' name='{ceph.pool}/{path.name}'><host name='{host}' port='{port}'/></source>"
        "<target dev='vda' bus='virtio'/></disk>"
    )


def assert_kept_secret(site: StageSite, ceph: LabCeph) -> None:
    """The key of the Ceph user is in no command line."""
    key = ceph.keyring(USER).read_text().split()[-1]
    assert not any(key in argument for process in site.processes() for argument in process.command)


def test_a_guest_with_two_layers_is_served_by_a_storage_daemon(site: StageSite, lab_ceph: LabCeph) -> None:
    path = place(lab_ceph)
    name = f"d{path.name}"
    made = ("--size", "8M", "--format", "raw", "--des", site.set)
    site.virt_sse("disk", "create", name, "--path", path, *made)
    disk = site.backend.disks.get(name)
    assert (disk.path, disk.size) == (path, 8 * M)
    guest = site.guest(disk)
    site.start_paused(guest)
    assert "<auth" not in site.virsh("dumpxml", guest.name)
    assert_kept_secret(site, lab_ceph)
    assert "wrote" in site.qemu_io(guest, f"write -P 0x5a {disk.size - 512} 512")
    site.virt_sse("vm", "verify", guest.name)
    guest.destroy()
    with plaintext(path, disk.format, site.backend.host.keys.unwrap_all(disk)) as content:
        assert content.read(disk.size - 512, 512) == b"\x5a" * 512
    guest.undefine()
    site.virt_sse("disk", "delete", name, "--purge")
    assert path.name not in lab_ceph.rbd("ls", lab_ceph.pool)


def test_an_image_has_one_user(site: StageSite, lab_ceph: LabCeph) -> None:
    disk = create(site, place(lab_ceph))
    name = f"{lab_ceph.pool}/{disk.path.name}"
    guest = site.guest(disk)
    with rbd_image._opened_for_writing(rbd_image.RbdName.of(disk.path)) as other:
        other.write(disk.size, bytes(512))
        assert f"{disk.path} is in use" in site.virsh("start", guest.name, status=1)
        with pytest.raises(DiskInUseError, match="in use by a running domain or another client"):
            site.backend.disks.check(disk.name)
    lab_ceph.rbd("feature", "disable", name, "fast-diff", "object-map", "exclusive-lock")
    assert "lacks the feature exclusive-lock" in site.virsh("start", guest.name, status=1)
    lab_ceph.rbd("feature", "enable", name, "exclusive-lock")
    thief = Guest(site.host, "thief", acceleration=site.acceleration, disks=[rbd_disk(disk.path, lab_ceph)])
    with pytest.raises(libvirt.libvirtError, match="without its key"):
        thief.start()


def test_disks_in_ceph_are_copied_and_adopted(site: StageSite, lab_ceph: LabCeph) -> None:
    """And what is not possible in Ceph is refused, before anything is changed."""
    backend = site.backend
    disk = create(site, place(lab_ceph))
    with rbd_image.opened(disk.path) as header:
        before = os.pread(header.descriptor, 4096, 0)
    copied, back = place(lab_ceph), place(lab_ceph)
    snapshot = site.host.images / f"{copied.name}.raw"
    site.virt_sse("snapshot", "create", "snap", "--disk", disk.name, "--incremental", "--path", snapshot)
    site.virt_sse("snapshot", "restore", "snap", "back", "--path", back)
    assert backend.disks.get("back").path == back
    for command, said in (
        (("disk", "reencrypt", disk.name), "cannot be re-encrypted from or into Ceph"),
        (("snapshot", "restore", "snap", disk.name, "--in-place"), "no copy can take its place"),
        (("disk", "create", "new", "--size", "8M", "--path", copied), "cannot be qcow2"),
        (("disk", "create", "new", "--size", "8M", "--format", "raw", "--path", disk.path), "exists already"),
        (
            ("disk", "create", "new", "--size", "8M", "--format", "raw", "--path", f"{copied}@1"),
            "invalid RBD",
        ),
    ):
        assert said in site.virt_sse(*command, status=2 if "invalid" in said or "qcow2" in said else 1)
    with rbd_image.opened(disk.path) as header:
        assert os.pread(header.descriptor, 4096, 0) == before

    backend.disks.resize(disk.name, 12 * M)
    backend.host.store.remove(disk.id)
    adopted = backend.disks.adopt(disk.path)
    assert (adopted.id, adopted.size) == (disk.id, 12 * M)
    site.virt_sse("disk", "delete", disk.name)
    site.virt_sse("disk", "recover", disk.name)
    assert show(site, disk)["state"] == "ready"


def test_a_damaged_header_is_refused(site: StageSite, lab_ceph: LabCeph) -> None:
    disk = create(site, place(lab_ceph))
    with rbd_image._opened_for_writing(rbd_image.RbdName.of(disk.path)) as image:
        page = bytearray(image.read(0, 4096))
        page[104:108] = (1 << 20).to_bytes(4, "big")  # the offset of the payload
        image.write(0, bytes(page))
    guest = site.guest(disk)
    assert "header" in site.virsh("start", guest.name, status=1)
    with pytest.raises(ImageError, match="unexpected offsets"):
        site.backend.disks.check(disk.name)


def test_a_guest_with_one_layer_waits_for_a_lost_osd(
    site: StageSite,
    lab_ceph: LabCeph,
    acceleration: Callable[[str], Acceleration],
    linux_micro: LinuxMicro,
) -> None:
    name = f"s{uuid.uuid4().hex[:8]}"
    site.backend.sets.create(name, provider="platform-managed", key="default")
    disk = create(site, place(lab_ceph), name)
    element = site.backend.domains.disk_element(disk.name)
    guest = WritingGuest(
        site.host, disk.name, disk=element, acceleration=acceleration("linux-micro"), boot=linux_micro
    )
    guest.define()
    guest.run()
    guest.await_writes()
    assert "<auth username='virt-sse'>" in site.virsh("dumpxml", guest.name)
    assert_kept_secret(site, lab_ceph)
    site.virt_sse("vm", "verify", guest.name)
    site.virt_sse("des", "rotate", name)
    lab_ceph.kill_osd()

    def has_stopped() -> bool:
        before = guest.serial
        time.sleep(0.5)
        return guest.serial == before

    wait_until(has_stopped, "the guest waits")
    assert site.state(guest)[0] in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED)
    lab_ceph.start_osd()
    guest.await_writes()
    guest.destroy()
    with plaintext(disk.path, disk.format, site.backend.host.keys.unwrap_all(disk)) as content:
        assert newest_block(content.read(0, disk.size)) >= guest.acknowledged
