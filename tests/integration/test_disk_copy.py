"""Copies of disks: the same content under keys of their own, in any disk encryption set."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.images import KeyedImage
from virt_sse.backend import Backend
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    ImageFormatError,
    InvalidValueError,
    PolicyError,
    StaleImageError,
)
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.system.progress import Progress, silent

M = 1 << 20
SIZE = M + 512
CONTENT = b"a copy is as secret as its source. " * (SIZE // 35) + bytes(SIZE - SIZE // 35 * 35)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup", "qemu-storage-daemon")


@pytest.fixture
def sets(backend: Backend) -> None:
    for name, kind in (("single", "CUSTOMER_KEY"), ("double", "PLATFORM_AND_CUSTOMER_KEYS")):
        backend.sets.create(
            name, provider="platform-managed", key="default", encryption_type=EncryptionType[kind]
        )


def source_disk(backend: Backend, root: Path, encryption_set: str | None, image_format: str) -> Disk:
    plain = root / "plain"
    plain.write_bytes(CONTENT)
    new = NewDisk(name="source", format=DiskFormat(image_format), encryption_set=encryption_set)
    disk = backend.transfer.import_image(new, plain, source_format="raw")
    plain.unlink()
    return disk


def content(backend: Backend, name: str, root: Path) -> bytes:
    target = root / "exported"
    backend.transfer.export(name, target, destination_format="raw")
    found = target.read_bytes()
    target.unlink()
    return found


def copied(backend: Backend, new: NewDisk, progress: Progress = silent) -> Disk:
    new = dataclasses.replace(new, source=backend.disks.get("source"))
    return backend.copies.copy([new], progress=progress).disks[0]


@pytest.mark.slow
@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize(
    ("origin", "image_format"), [(None, "qcow2"), ("single", "raw"), ("double", "qcow2"), ("double", "raw")]
)
def test_a_copy_has_the_content_and_size_of_its_source_and_keys_of_its_own(
    backend: Backend, root: Path, origin: str | None, image_format: str
) -> None:
    source = source_disk(backend, root, origin, image_format)
    before = source.path.read_bytes()
    seen: list[float] = []
    kinds = itertools.cycle(DiskFormat if image_format == "raw" else reversed(DiskFormat))
    for number, (target, kind) in enumerate(zip((None, "single", "double"), kinds, strict=False)):
        new = NewDisk(name=f"copy{number}", format=kind, encryption_set=target)
        copy = copied(backend, new, seen.append)
        assert (copy.size, copy.format, len(copy.deks)) == (SIZE, kind, 2 if target == "double" else 1)
        wrapped = {entry.wrapped.ciphertext for entry in (*source.deks, *copy.deks)}
        assert len(wrapped) == len(source.deks) + len(copy.deks)
        backend.disks.check(copy.name)
        assert content(backend, copy.name, root) == CONTENT
    assert seen[-1] == 1.0
    assert source.path.read_bytes() == before
    assert not images.contains(list(source.path.parent.iterdir()), CONTENT[:35])


def test_a_disk_in_use_or_gone_stale_is_not_copied(backend: Backend) -> None:
    disk = backend.disks.create(NewDisk(name="source", size=M))
    older = shutil.copy(disk.path, disk.path.with_name("older"))
    image = KeyedImage.of(backend, disk)
    for read_only in (False, True):
        with image.held(read_only=read_only), pytest.raises(DiskInUseError, match="in use"):
            copied(backend, NewDisk(name="copy"))
    backend.host.freshness.begin_use(disk)
    shutil.copyfile(older, disk.path)
    with pytest.raises(StaleImageError, match="an older copy"):
        copied(backend, NewDisk(name="copy"))
    assert [each.name for each in backend.disks.all()] == ["source"]
    assert images.files_below(disk.path.parent) == ["older", "source.qcow2"]


def test_a_copy_takes_no_name_and_no_file_that_exist(backend: Backend) -> None:
    disk = backend.disks.create(NewDisk(name="source", size=M))
    with pytest.raises(DiskExistsError):
        copied(backend, NewDisk(name="source", place=disk.path.with_name("other")))
    with pytest.raises(DiskExistsError):
        copied(backend, NewDisk(name="other", place=disk.path))
    backend.disks.check("source")


def test_a_source_with_a_forged_header_is_not_copied(backend: Backend) -> None:
    disk = backend.disks.create(NewDisk(name="source", size=M))
    with disk.path.open("r+b") as file:
        file.seek(8)  # the name of a backing file (QEMU docs/interop/qcow2.txt)
        file.write((104).to_bytes(8, "big") + (11).to_bytes(4, "big"))
    with pytest.raises(ImageFormatError, match="backing file"):
        copied(backend, NewDisk(name="copy"))


@pytest.mark.usefixtures("sets")
def test_the_command_keeps_the_set_unless_told_otherwise(backend: Backend, virt_sse: CommandLine) -> None:
    backend.disks.create(NewDisk(name="source", size=M, encryption_set="single", sku=DiskSku.ULTRA))
    virt_sse("disk", "copy", "source", "kept")
    platform = EncryptionType.PLATFORM_KEY.value
    virt_sse("disk", "copy", "source", "free", "--encryption-type", platform, "--sku", "Standard_LRS")
    kept, free = (backend.disks.get(name) for name in ("kept", "free"))
    assert (kept.set_id, kept.sku) == (backend.sets.get("single").id, DiskSku.ULTRA)
    assert (free.set_id, free.sku) == (None, DiskSku.STANDARD_HDD)
    refused = virt_sse.refuses("disk", "update", "kept", "--encryption-type", platform)
    assert "customer-managed keys cannot be turned off" in refused
    assert "virt-sse disk copy kept NEW" in refused
    assert "exclude each other" in virt_sse.refuses(
        "disk", "copy", "kept", "x", "--des", "single", "--encryption-type", platform, status=2
    )
    with pytest.raises(InvalidValueError, match="has the type"):
        backend.sets.require_type("double", kept.encryption_type)
    with pytest.raises(PolicyError, match="has single encryption") as caught:
        backend.sets.move_disk("kept", "double")
    assert "virt-sse disk copy kept NEW --des double" in str(caught.value.hint)
