"""Hostile image headers are refused at once by every command, and no file that they name is touched."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.hostile_images import LUKS, QCOW2, Canary, Header
from support.images import info, require
from virt_sse.backend import Backend
from virt_sse.errors import DiskNotFoundError, ImageError, ImageFormatError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import img, unlocking
from virt_sse.qemu.formatting import Volume, make

M = 1 << 20
OUTER = [("qcow2", name) for name in (*QCOW2, *LUKS)] + [("raw", name) for name in LUKS]
INNER = [
    ("qcow2", "backing file"),
    ("qcow2", "backing file by nbd"),
    ("qcow2", "data file"),
    ("qcow2", "raw data file"),
    ("qcow2", "corrupt"),
    ("qcow2", "unknown extension"),
    ("qcow2", "snapshots"),
    ("qcow2", "huge L1 table"),
    ("qcow2", "LUKS header outside"),
    ("qcow2", "iterations of a keyslot"),
    ("raw", "iterations of a keyslot"),
    ("raw", "iterations of the digest"),
]
AT_ONCE = 5.0
"""Seconds; a header with many iterations would take minutes."""


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu-img", "qemu-io", "qemu-storage-daemon", "cryptsetup")


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


def double_set(backend: Backend) -> str:
    double = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
    backend.sets.create("double", provider="platform-managed", key="default", encryption_type=double)
    return "double"


def double_disk(backend: Backend, image_format: str) -> Disk:
    double_set(backend)
    return backend.disks.create(
        NewDisk(name="disk", size=M, format=DiskFormat(image_format), encryption_set="double")
    )


def assert_refused(backend: Backend, disk: Disk, reason: str, root: Path, canary: Canary) -> None:
    """Check that each command refuses the disk in time, naming the file and the reason."""
    deks = backend.host.keys.unwrap_all(disk)
    exported = root / "exported"
    commands: dict[str, Callable[[], object]] = {
        "check": lambda: backend.disks.check("disk"),
        "export": lambda: backend.transfer.export("disk", exported, destination_format="raw"),
        "resize": lambda: backend.disks.resize("disk", 2 * M),
        "shrink": lambda: backend.disks.resize("disk", M // 2, shrink=True),
        "inspect": lambda: backend.inspector.disk(disk),
        "start": lambda: unlocking.validate(disk.path, disk.format, deks[1:]),
    }
    for name, command in commands.items():
        began = time.monotonic()
        with pytest.raises(ImageFormatError) as caught:
            command()
        assert time.monotonic() - began < AT_ONCE, name
        assert reason in str(caught.value), name
        assert str(disk.path) in str(caught.value), name
    assert not exported.exists()
    canary.assert_untouched()
    backend.disks.all()
    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()
    with Backend.open(root) as again:
        encryption_set = double_set(again) if len(deks) > 1 else None
        with pytest.raises(ImageFormatError) as caught:
            again.disks.adopt(disk.path, encryption_set=encryption_set)
        assert reason in str(caught.value)
        assert again.disks.all() == []
    canary.assert_untouched()


@pytest.mark.slow
@pytest.mark.parametrize(("image_format", "change"), OUTER)
def test_a_hostile_header_is_refused_by_every_command(
    backend: Backend, root: Path, canary: Canary, image_format: str, change: str
) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat(image_format)))
    reason = Header(disk).change(change, canary.path)
    assert_refused(backend, disk, reason, root, canary)


@pytest.mark.slow
@pytest.mark.parametrize(("image_format", "change"), INNER)
def test_a_hostile_header_of_an_inner_layer_is_refused_by_every_command(
    backend: Backend, root: Path, canary: Canary, image_format: str, change: str
) -> None:
    disk = double_disk(backend, image_format)
    outer = backend.host.keys.unwrap_all(disk)[1:]
    reason = Header(disk, outer).change(change, canary.path)
    assert_refused(backend, disk, reason, root, canary)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["backing file", "data file", "raw data file", "corrupt"])
def test_a_disk_with_a_hostile_header_can_be_deleted(backend: Backend, canary: Canary, change: str) -> None:
    """Only the LUKS header is read and overwritten; nothing follows the names in the header."""
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    Header(disk).change(change, canary.path)
    backend.disks.erase(disk)
    assert not disk.path.exists()
    with pytest.raises(DiskNotFoundError):
        backend.disks.get("disk")
    canary.assert_untouched()


@pytest.mark.slow
@pytest.mark.parametrize("change", [*LUKS, "LUKS header outside"])
def test_lengths_in_a_hostile_header_erase_nothing(backend: Backend, canary: Canary, change: str) -> None:
    """The file may not be the disk's any more: it stays, and so does the disk."""
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    Header(disk).change(change, canary.path)
    before = disk.path.read_bytes()
    with pytest.raises(ImageError, match="is not the image of disk 'disk' any more, or is damaged"):
        backend.disks.erase(disk)
    assert disk.path.read_bytes() == before
    assert backend.disks.get("disk") == disk


def test_the_bitmaps_of_libvirts_checkpoints_are_accepted(tmp_path: Path) -> None:
    dek, path = Dek.generate(), tmp_path / "image"
    make(path, DiskFormat.QCOW2, M, [Volume(AES_256_XTS, dek)])
    with unlocking.secrets_for([dek]) as (secrets, descriptors):
        subprocess.run(
            ["qemu-img", "bitmap", *secrets, "--add", "--image-opts"]
            + [unlocking.image_options(path, DiskFormat.QCOW2, 1), "checkpoint"],
            pass_fds=descriptors,
            check=True,
        )
    assert "checkpoint" in json.dumps(info(path))
    unlocking.validate(path, DiskFormat.QCOW2, [])
    img.check(path, DiskFormat.QCOW2, [dek])


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize("cipher", ["aes-256-xts", "serpent-256-xts", "twofish-256-cbc"])
def test_headers_of_all_formatters_are_accepted(tmp_path: Path, image_format: str, cipher: str) -> None:
    """qemu-img measures the machine for its iteration counts; they stay below the bound."""
    dek, path, kind = Dek.generate(), tmp_path / "image", DiskFormat(image_format)
    make(path, kind, M, [Volume(Cipher.parse(cipher), dek)])
    unlocking.validate(path, kind, [])
