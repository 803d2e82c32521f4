from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.disk_places import DiskPlace
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.slots import TEMP_SLOT

ID = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")


def secret(slot: str) -> str:
    usage = SecretName(ID, slot).usage
    return f"<encryption format='luks'><secret type='passphrase' usage='{usage}'/></encryption>"


def of(*disks: str) -> list[DiskPlace]:
    return DomainDefinition.parse(f"<domain><devices>{''.join(disks)}</devices></domain>").disk_places()


PLACES = {
    "a file": (
        "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/a b'/><target dev='vda'/></disk>",
        DiskPlace("vda", path=Path("/a b"), format="qcow2"),
    ),
    "a file without a driver": (
        "<disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk>",
        DiskPlace("vda", path=Path("/a"), format="raw"),
    ),
    "a device": (
        "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sda'/></disk>",
        DiskPlace("sda", path=Path("/dev/sdx")),
    ),
    "a volume": (
        "<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>",
        DiskPlace("vda", volume=("p", "v")),
    ),
    "ours": (
        f"<disk type='file'><source file='/a'>{secret('service')}</source><target dev='vda'/></disk>",
        DiskPlace("vda", disk_id=ID),
    ),
    "ours behind a socket": (
        f"<disk type='network'><source protocol='nbd'>{secret('service')}</source><target dev='vda'/></disk>",
        DiskPlace("vda", disk_id=ID),
    ),
    "ours, decrypted below QEMU": (
        f"<disk type='network'><source protocol='nbd' name='virt-sse:{ID}'/><target dev='vda'/></disk>",
        DiskPlace("vda", disk_id=ID),
    ),
    "ours, of old libvirt": (
        f"<disk type='file'><source file='/a'/>{secret('service')}<target dev='vda'/></disk>",
        DiskPlace("vda", disk_id=ID),
    ),
    "an overlay over ours": (
        "<disk type='file'><driver type='qcow2'/><source file='/o'/><target dev='vda'/>"
        f"<backingStore type='file'><source file='/a'>{secret('service')}</source></backingStore></disk>",
        DiskPlace("vda", path=Path("/o"), format="qcow2"),
    ),
    "encrypted by others": (
        "<disk type='file'><source file='/a'><encryption format='luks'><secret type='passphrase' usage='x'/>"
        "</encryption></source><target dev='vda'/></disk>",
        DiskPlace("vda", obstacle="the image is encrypted, but not by virt-sse"),
    ),
    "in a network": (
        "<disk type='network'><source protocol='rbd' name='x'/><target dev='vda'/></disk>",
        DiskPlace("vda", obstacle="disk type 'network' is neither a file nor a block device"),
    ),
    "a slice": (
        "<disk type='file'><source file='/a'><slices><slice type='storage' offset='512' size='512'/></slices>"
        "</source><target dev='vda'/></disk>",
        DiskPlace("vda", obstacle="the disk is a slice of an image"),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_place_of_every_kind_of_disk_is_found(name: str) -> None:
    xml, place = PLACES[name]
    assert of(xml) == [place]


def test_drives_and_temporary_disks_are_no_disks() -> None:
    drive = "<disk type='file' device='{}'><source file='/a'/><target dev='sda'/></disk>"
    temp = f"<disk type='file'><source file='/t'>{secret(TEMP_SLOT)}</source><target dev='vdb'/></disk>"
    assert of(drive.format("cdrom"), drive.format("floppy"), temp) == []


@pytest.mark.parametrize("secret", ["virt-sse:", "virt-sse:x:service", f"virt-sse:{ID}"])
def test_a_secret_of_others_that_resembles_ours_is_ignored(secret: str) -> None:
    with pytest.raises(InvalidValueError, match="names an unknown secret"):
        of(f"<disk type='file'><encryption><secret usage='{secret}'/></encryption></disk>")
