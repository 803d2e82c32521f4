"""Disks on block devices: here loop devices, as LVM volumes are elsewhere."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from support.images import require
from support.loop_devices import block_disk, grow, loop_device
from support.stage_site import StageSite, owner, show, stage_site_fixtures
from virt_sse.backend import Backend
from virt_sse.disks.copies import new_copy
from virt_sse.errors import DiskExistsError, DiskInUseError, ImageError, InvalidValueError
from virt_sse.lab.guests import Guest
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import EncryptionType, Placement
from virt_sse.qemu import device_image
from virt_sse.qemu.formatting import header_length
from virt_sse.qemu.luks import MAGIC

M = 1 << 20
LENGTH = 16 * M + 512

running_site, site = stage_site_fixtures()


@pytest.fixture(name="below")
def _below(tmp_path: Path) -> Path:
    require("qemu-img", "qemu-io", "cryptsetup", "wipefs", "mkswap")
    path = tmp_path / "below"
    with path.open("wb") as file:
        file.truncate(LENGTH)
    return path


@pytest.fixture(name="device")
def _device(below: Path) -> Iterator[Path]:
    with loop_device(below) as device:
        yield device


def create(backend: Backend, device: Path, encryption_set: str | None = None) -> Disk:
    name = f"b{uuid.uuid4().hex[:8]}"
    new = NewDisk(name=name, format=DiskFormat.RAW, place=device, encryption_set=encryption_set)
    return backend.disks.create(new)


def double(backend: Backend) -> str:
    return backend.sets.create(
        "double",
        provider="platform-managed",
        key="default",
        encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    ).name


def room(disk: Disk, length: int = LENGTH) -> int:
    return length - sum(header_length(entry.cipher) for entry in disk.deks)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_disk_takes_a_whole_block_device(backend: Backend, device: Path, below: Path, layers: int) -> None:
    disk = create(backend, device, double(backend) if layers == 2 else None)
    assert disk.path == device
    assert disk.size == room(disk)
    backend.disks.check(disk.name)
    with pytest.raises(ImageError, match=f"{device} holds data: crypto_LUKS"):
        create(backend, device)

    snapshot = new_copy(disk, "copy", DiskKind.SNAPSHOT)
    (copied,) = backend.copies.copy([replace(snapshot, place=below.with_name("copy.raw"))]).disks
    assert copied.size == disk.size
    backend.disks.check("copy")

    grow(device, below, LENGTH + M)
    with pytest.raises(InvalidValueError, match=f"has {room(disk) + M} bytes, not {disk.size + 2 * M}"):
        backend.disks.resize(disk.name, disk.size + 2 * M)
    assert backend.disks.resize(disk.name, disk.size + M).size == room(disk) + M
    backend.disks.check(disk.name)

    backend.host.store.remove(disk.id)
    adopted = backend.disks.adopt(device)
    assert (adopted.id, adopted.size, adopted.path) == (disk.id, disk.size + M, device)
    before = below.read_bytes()[: disk.size]
    backend.disks.erase(adopted)
    after = below.read_bytes()
    assert device.is_block_device()
    assert not after.startswith(MAGIC)
    assert str(disk.id).encode() not in after
    header = header_length(disk.deks[-1].cipher)
    assert after[4096:260000] != before[4096:260000]
    assert after[header + M :][:M] == before[header + M :][:M]
    create(backend, device)


def test_what_cannot_be_on_a_block_device_is_refused(backend: Backend, device: Path, tmp_path: Path) -> None:
    new = NewDisk(name="new", format=DiskFormat.RAW, place=device)
    with pytest.raises(InvalidValueError, match="cannot be qcow2"):
        backend.disks.create(replace(new, format=DiskFormat.QCOW2))
    with pytest.raises(InvalidValueError, match="it takes the whole block device"):
        backend.disks.create(replace(new, size=8 * M))
    link = tmp_path / "link"
    link.symlink_to(device)
    with pytest.raises(DiskExistsError, match="exists already"):
        backend.disks.create(replace(new, size=M, place=link))
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(M))
    with pytest.raises(InvalidValueError, match="only empty disks"):
        backend.transfer.import_image(new, plain, source_format="raw")
    source = backend.disks.create(NewDisk(name="source", size=M))
    with pytest.raises(InvalidValueError, match="only empty disks"):
        backend.copies.copy([replace(new_copy(source, "copy", DiskKind.DISK), place=device)])
    claimed = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount does
    try:
        with pytest.raises(DiskInUseError, match="mounted"):
            backend.disks.create(new)
    finally:
        os.close(claimed)
    assert not any(device.read_bytes())
    subprocess.run(["mkswap", "--quiet", device], check=True)
    with pytest.raises(ImageError, match="holds data: swap"):
        backend.disks.create(new)
    assert [disk.name for disk in backend.disks.all()] == ["source"]


def test_a_creation_cut_off_leaves_nothing_to_open(
    backend: Backend, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keyslots without a header, which is written last."""

    class Killed(BaseException):
        pass

    written: list[int] = []

    def write_at(descriptor: int, content: bytes, offset: int) -> None:
        if offset == 0:
            raise Killed
        written.append(os.pwrite(descriptor, content, offset))

    with monkeypatch.context() as patch:
        patch.setattr(device_image, "write_at", write_at)
        with pytest.raises(Killed):
            create(backend, device)
    assert written
    assert backend.disks.all() == []
    assert not any(device.read_bytes()[:4096])
    backend.disks.check(create(backend, device).name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "placement"),
    [(1, None), (2, None), (1, Placement.STORAGE)],
    ids=["single", "double", "storage"],
)
def test_guests_use_disks_on_block_devices(
    site: StageSite, device: Path, below: Path, layers: int, placement: Placement | None
) -> None:
    kind = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS if layers == 2 else EncryptionType.CUSTOMER_KEY
    name = f"s{uuid.uuid4().hex[:8]}"
    site.backend.sets.create(
        name, provider="platform-managed", key="default", encryption_type=kind, placement=placement
    )
    disk = create(site.backend, device, name)
    before = owner(disk)
    guest = site.guest(disk)
    assert (f"dev='{device}'" in site.virsh("dumpxml", guest.name)) is (layers == 1 and placement is None)
    site.start_paused(guest)
    assert "wrote" in site.qemu_io(guest, f"write -P 0x5a {disk.size - 512} 512")
    site.virt_sse("vm", "verify", guest.name)
    site.virt_sse("des", "rotate", name)
    if layers == 1 and placement is None:
        assert "in use by a running domain" in site.virt_sse("disk", "check", disk.name, status=1)
        assert "attached" in site.virt_sse("disk", "delete", disk.name, status=1)
        grow(device, below, LENGTH + M)
        site.virt_sse("disk", "resize", disk.name, str(disk.size + M))
        assert "wrote" in site.qemu_io(guest, f"write -P 0x5a {disk.size + M - 512} 512")
        copy = site.host.images / "snap.raw"
        site.virt_sse("snapshot", "create", f"{disk.name}-snap", "--disk", disk.name, "--path", copy)
        site.virt_sse("snapshot", "delete", f"{disk.name}-snap")
    guest.destroy()
    site.start_paused(guest)
    assert "failed" not in site.qemu_io(guest, f"read -P 0x5a {disk.size - 512} 512")
    guest.destroy()
    assert owner(disk) == before
    assert site.left() == {}

    elements = [block_disk(device)]
    thief = Guest(site.host, f"{disk.name}-thief", acceleration=site.acceleration, disks=elements)
    with pytest.raises(libvirt.libvirtError, match="without its key"):
        thief.start()
    assert show(site, disk)["state"] == "ready"
    if layers == 1 and placement is None:
        site.virt_sse("disk", "reencrypt", disk.name, "--path", site.host.images / "moved.raw")
        assert device.read_bytes()[:6] != MAGIC
    guest.undefine()
    thief.undefine()
    site.virt_sse("disk", "delete", disk.name, "--purge")
