"""Guests that run from linked clones of one image."""

from __future__ import annotations

import json

import pytest

from support.disk_contents import decrypted
from support.process_memory import found_in_memory
from support.stage_site import StageSite, owner, stage_site_fixtures
from virt_sse.errors import DiskInUseError
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.replacement.offline import no_bars
from virt_sse.replacement.reencryption import Reencryption
from virt_sse.verification.processes import open_files

M = 1 << 20
running_site, site = stage_site_fixtures()


def link(site: StageSite, name: str, image: Disk, size: int | None = None) -> Disk:
    new = NewDisk(name=name, size=size, place=site.host.images / f"{name}.qcow2")
    return site.backend.images.new_clone(image.name, new)


@pytest.mark.slow
def test_two_guests_run_from_clones_of_one_image(site: StageSite) -> None:
    image = site.backend.images.create("boots", site.disk().name)
    clones = [link(site, name, image) for name in ("one", "two")]
    before = image.path.read_bytes()
    guests = [site.guest(clone) for clone in clones]
    moved = image.path.rename(image.path.with_suffix(".moved"))
    assert f"image {image.path} is missing" in site.virsh("start", guests[0].name, status=1)
    moved.rename(image.path)
    for guest in guests:
        guest.start()
    for number, guest in enumerate(guests):
        assert "verified 8 sectors, ok" in guest.wait_for("boot-sector: done")
        site.qemu_io(guest, f"write -P {0x50 + number} 64K 4K")
    assert site.secrets() == [], "libvirt has no secret"
    deks = [site.dek(each, entry.slot).passphrase for each in (image, *clones) for entry in each.deks]
    for guest in guests:
        pid = site.qemu(guest).pid
        assert found_in_memory(pid, deks) == []
        assert not [file.name for file in open_files(pid) if file.name.endswith(".qcow2")]
    assert owner(image) == 0
    with pytest.raises(DiskInUseError, match="has linked clones, unreadable without it: one, two"):
        site.backend.images.delete(image.name)
    with pytest.raises(DiskInUseError, match="'one' is attached to domain"):
        site.backend.images.delete(image.name, force=True)

    site.virt_sse("snapshot", "create", "whole", "--disk", "one")
    content = decrypted(site.backend, site.backend.snapshots.get("whole"))
    assert content[64 << 10 : 68 << 10] == b"\x50" * 4096
    assert content[:512] == decrypted(site.backend, image)[:512], "the boot sector is the image's"

    link(site, "extra", image, size=16 * M)
    site.virt_sse("disk", "attach", "extra", guests[0].name)
    said = site.virt_sse("vm", "verify", guests[0].name, "--output", "json")
    document, _ = json.JSONDecoder().raw_decode(said)
    assert {each["disk"] for each in document["disks"]} == {"one", "extra"}
    for each in document["disks"]:
        assert [(layer["where"], layer["slot"]) for layer in each["layers"]] == [
            ("storage daemon", "service"),
            ("storage daemon", "infrastructure"),
            ("image", "infrastructure"),
            ("within that", "service"),
            ("image below", "infrastructure"),
        ]
    for guest in guests:
        guest.destroy()
    assert site.left() == {}
    assert image.path.read_bytes() == before

    site.forget_domains()
    site.backend.reencryption.reencrypt("one", Reencryption(), no_bars)
    assert site.backend.disks.get("one").base_id is None
    erased = site.backend.images.delete(image.name, force=True)
    assert [each.name for each in erased] == ["extra", "two", image.name]
    assert decrypted(site.backend, site.backend.disks.get("one")) == content
