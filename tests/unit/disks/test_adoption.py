"""Images of deleted disks, moved disks, changed ciphers and taken names at an adoption."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from virt_sse.backend import Backend
from virt_sse.disks import adoption
from virt_sse.errors import DiskExistsError, EnvelopeError, InvalidValueError, StaleImageError
from virt_sse.keys import image_state_files
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import envelope_slots, formatting, image_file
from virt_sse.qemu.formatting import Volume

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.fixture
def disk(backend: Backend) -> Disk:
    return backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat.RAW))


def copied(disk: Disk) -> Path:
    return Path(shutil.copy(disk.path, disk.path.with_suffix(".copy")))


def test_a_copy_of_a_deleted_disk_is_adopted_with_trust_alone(
    backend: Backend, disk: Disk, virt_sse: CommandLine
) -> None:
    older = copied(disk)
    backend.host.freshness.begin_use(disk)
    newest = Path(shutil.copy(disk.path, disk.path.with_suffix(".newest")))
    backend.disks.erase(disk)
    for path in (older, newest):
        said = virt_sse.refuses("disk", "adopt", path)
        assert "is of a disk that was deleted on this host, at 20" in said
        assert "e.g. from a backup, pass --trust" in said
    assert backend.disks.all() == []
    virt_sse("disk", "adopt", newest, "--trust")
    backend.disks.check("disk")
    backend.host.freshness.begin_use(backend.disks.get("disk"))
    newest.write_bytes(older.read_bytes())
    with pytest.raises(StaleImageError, match="an older copy"):
        backend.disks.check("disk")


def test_a_deleted_disk_that_returns_with_a_backup_of_the_store_needs_trust(
    backend: Backend, disk: Disk
) -> None:
    copy = copied(disk)
    backend.disks.erase(disk)
    copy.rename(disk.path)
    backend.host.store.add(disk)
    with pytest.raises(StaleImageError, match="disk that was deleted at"):
        backend.host.freshness.begin_use(disk)
    backend.host.freshness.end_use(disk.id, disk.path)
    backend.disks.trust("disk")
    backend.disks.check("disk")


def test_the_newest_deletions_are_remembered(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_state_files, "MOST_DELETED", 2)
    made = [
        backend.disks.create(NewDisk(name=f"d{number}", size=M, format=DiskFormat.RAW)) for number in range(3)
    ]
    for number, each in enumerate(made):
        backend.disks.erase(each)
        note = root / f"var/lib/virt-sse/image-states/deleted/{each.id}"
        os.utime(note, (number, number))
    kept = {path.name for path in (root / "var/lib/virt-sse/image-states/deleted").iterdir()}
    assert kept == {str(each.id) for each in made[1:]}


@pytest.mark.parametrize("double", [False, True])
def test_a_cipher_in_the_envelope_unlike_the_headers_is_not_adopted(backend: Backend, double: bool) -> None:
    """The image opens with its DEKs: QEMU takes the cipher from the header."""
    if double:
        kind = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
        backend.sets.create("set", provider="platform-managed", key="default", encryption_type=kind)
    disk = backend.disks.create(
        NewDisk(name="disk", size=M, format=DiskFormat.RAW, encryption_set="set" if double else None)
    )
    deks = backend.host.keys.unwrap_all(disk)
    ciphers = [Cipher.parse("aes-256-cbc"), *(entry.cipher for entry in disk.deks[1:])]
    disk.path.unlink()
    volumes = [Volume(cipher, dek) for cipher, dek in zip(ciphers, deks, strict=True)]
    formatting.make(disk.path, disk.format, M, volumes)
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        envelope_slots.write(descriptor, disk.format, disk.envelope)
    backend.host.store.remove(disk.id)
    with pytest.raises(EnvelopeError, match=r"states aes-256-xts for slot 'service', .* has aes-256-cbc"):
        backend.disks.adopt(disk.path, trust=True)
    assert backend.disks.all() == []


def test_a_moved_disk_keeps_its_name_and_set(backend: Backend, disk: Disk) -> None:
    backend.sets.create(
        "set", provider="platform-managed", key="default", encryption_type=EncryptionType.CUSTOMER_KEY
    )
    moved = disk.path.rename(disk.path.with_suffix(".moved"))
    before = moved.read_bytes()
    with pytest.raises(InvalidValueError, match="the store has this disk as 'disk'"):
        backend.disks.adopt(moved, name="other")
    with pytest.raises(InvalidValueError, match="is not in encryption set 'set'"):
        backend.disks.adopt(moved, encryption_set="set")
    assert moved.read_bytes() == before
    assert backend.disks.adopt(moved, name="disk").path == moved
    backend.disks.check("disk")


def test_a_moved_disk_gets_the_envelope_of_the_store(backend: Backend, disk: Disk) -> None:
    """The image is from before a rotation, and named otherwise by the host that used it."""
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        renamed = dataclasses.replace(disk.envelope, name="elsewhere")
        envelope_slots.write(descriptor, disk.format, renamed, (backend.host.freshness.key, 7))
    moved = disk.path.rename(disk.path.with_suffix(".moved"))
    assert backend.disks.adopt(moved).name == "disk"
    backend.disks.check("disk")


def test_a_name_taken_during_an_adoption_leaves_the_image_as_it_is(
    backend: Backend, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(disk)
    before = copy.read_bytes()
    backend.host.store.remove(disk.id)
    validate = adoption.Adoption._validate

    def lost_race(self: adoption.Adoption, adopted: Disk, deks: object, base: None) -> None:
        validate(self, adopted, deks, base)  # type: ignore[arg-type]
        backend.disks.create(NewDisk(name="taken", size=M, format=DiskFormat.RAW))

    monkeypatch.setattr(adoption.Adoption, "_validate", lost_race)
    with pytest.raises(DiskExistsError, match="a disk with name 'taken' exists already"):
        backend.disks.adopt(copy, name="taken", trust=True)
    assert copy.read_bytes() == before
    assert [each.name for each in backend.disks.all()] == ["taken"]


def test_a_failed_adoption_leaves_the_store_as_it_was(
    backend: Backend, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.host.store.remove(disk.id)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(backend.host.freshness, "write_envelope", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.disks.adopt(disk.path, name="other")
    assert backend.disks.all() == []
    assert backend.disks.adopt(disk.path, name="other").name == "other"
    backend.disks.check("other")
