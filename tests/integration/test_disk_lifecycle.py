"""Disks from their making to their end, seen with QEMU's and cryptsetup's own tools. Needs no libvirt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.command_line import CommandLine
from support.images import FORMATS, KeyedImage
from virt_sse.backend import Backend
from virt_sse.disks import erasure
from virt_sse.disks.stored_images import image_state
from virt_sse.errors import DiskExistsError, DiskInUseError, DiskNotFoundError, ImageError, InvalidValueError
from virt_sse.host.setup import initialise
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.qemu import img

M = 1 << 20
SIZES = (512, 1024, 3 * 512, M, M + 512, 7 * 1001 * 512, 10 << 30, 64 << 40)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


def create(backend: Backend, name: str, size: int = M, image_format: str = "qcow2") -> Disk:
    return backend.disks.create(NewDisk(name=name, size=size, format=DiskFormat(image_format)))


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_the_guest_sees_exactly_the_size_that_was_asked_for(backend: Backend, image_format: str) -> None:
    for size in SIZES if image_format == "qcow2" else SIZES[:-1]:  # no file can be larger than 16 TiB
        disk = create(backend, f"disk-{size}", size, image_format)
        image = KeyedImage.of(backend, disk)
        assert image.size() == size
        assert disk.size == backend.disks.get(disk.name).size == size
        assert image.has(size - 512, 512, 0) or image_format == "raw"  # raw: never written, decrypts to noise
        image.write(size - 512, 512, 0x5A)
        assert image.has(size - 512, 512, 0x5A)
        assert image.io(f"write {size} 512").returncode == 1
    with image.served() as qmp:
        (node,) = [node for node in qmp("query-named-block-nodes") if node["node-name"] == "disk"]
    assert node["image"]["virtual-size"] == size
    assert node["encrypted"]


@pytest.mark.parametrize("image_format", FORMATS)
def test_cryptsetup_and_qemu_img_see_ordinary_luks(
    backend: Backend, image_format: str, tmp_path: Path
) -> None:
    disk = create(backend, "disk", M, image_format)
    key = images.passphrase(backend, disk)
    found = images.info(disk.path)
    assert found["encrypted"]
    luks = found["format-specific"]["data"]
    luks = luks.get("encrypt", luks)
    assert (luks["cipher-alg"], luks["cipher-mode"], luks["ivgen-alg"]) == ("aes-256", "xts", "plain64")
    assert [slot["active"] for slot in luks["slots"]] == [True] + [False] * 7

    volume = images.luks_volume(disk, tmp_path)
    assert images.cryptsetup("isLuks", "--type", "luks1", volume).returncode == 0
    dump = images.cryptsetup("luksDump", volume).stdout.decode()
    assert "MK bits:       \t512" in dump
    assert "Key Slot 0: ENABLED" in dump
    assert "Key Slot 1: DISABLED" in dump
    test = ("open", "--test-passphrase", "--key-file", "-", volume)
    assert images.cryptsetup(*test, stdin=key).returncode == 0
    assert images.cryptsetup(*test, stdin=key[:-1]).returncode == 2
    assert images.cryptsetup(*test, stdin=key + b"\n").returncode == 2


def test_qemu_img_check_is_clean(backend: Backend) -> None:
    for size in (512, M + 512, 64 << 40):
        disk = create(backend, f"disk-{size}", size)
        image = KeyedImage.of(backend, disk)
        image.write(0, 512, 1)
        image.write(size - 512, 512, 1)
        done = subprocess.run(
            ["qemu-img", "check", "--output=json", "--object", image.secret]
            + ["--image-opts", image.options],
            capture_output=True,
            check=True,
        )
        report = json.loads(done.stdout)
        assert report["check-errors"] == 0
        assert not {"leaks", "corruptions"} & set(report)


@pytest.mark.parametrize("image_format", FORMATS)
def test_data_written_through_the_key_is_encrypted_in_the_file(backend: Backend, image_format: str) -> None:
    disk = create(backend, "disk", 4 * M, image_format)
    image = KeyedImage.of(backend, disk)
    image.write(M, 2 * M, 0xA7)
    assert image.has(M, 2 * M, 0xA7)
    assert not images.contains([disk.path], b"\xa7" * 8)
    assert not KeyedImage(disk.path, image_format, b"wrong").opens()
    backend.disks.check("disk")


def test_two_disks_share_no_key_and_no_ciphertext(backend: Backend) -> None:
    disks = [create(backend, name, M, "raw") for name in ("one", "two")]
    first, second = (KeyedImage.of(backend, disk) for disk in disks)
    assert first.passphrase != second.passphrase
    assert not KeyedImage(second.path, "raw", first.passphrase).opens()
    for image in (first, second):
        image.write(0, M, 0x11)
    assert first.path.read_bytes()[-M:] != second.path.read_bytes()[-M:]


def test_files_and_folders_are_ours_alone(backend: Backend, root: Path) -> None:
    before = os.umask(0)
    try:
        for image_format in FORMATS:
            assert images.mode(create(backend, image_format, M, image_format).path) == 0o600
        backend.transfer.export("raw", root / "export")
    finally:
        os.umask(before)
    assert images.mode(root / "export") == 0o600
    state = root / "var/lib/virt-sse"
    assert images.mode(state) == 0o700
    for path in state.rglob("*"):
        assert images.mode(path) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("source_format", ["raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc"])
def test_an_import_has_the_content_of_its_source(
    backend: Backend, tmp_path: Path, source_format: str
) -> None:
    content = bytes(M) + os.urandom(M) + bytes(M) + b"\xc3" * M
    source = images.make_plain(tmp_path / "source", source_format, content)
    image_format = "raw" if source_format in ("raw", "vdi") else "qcow2"
    progress: list[float] = []
    disk = backend.transfer.import_image(
        NewDisk(name="disk", format=DiskFormat(image_format)), source, progress=progress.append
    )
    image = KeyedImage.of(backend, disk)
    assert image.equals(source, source_format)
    assert image.has(3 * M, M, 0xC3)
    assert disk.size == image.size() == images.info(source)["virtual-size"]
    assert not images.contains([disk.path], content[M : M + 64], b"\xc3" * 64)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    backend.disks.check("disk")


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("destination_format", FORMATS)
def test_an_export_is_the_plaintext(
    backend: Backend, tmp_path: Path, image_format: str, destination_format: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(M) + bytes(M) + b"\xc3" * 512)
    disk = backend.transfer.import_image(
        NewDisk(name="disk", format=DiskFormat(image_format)), source, source_format="raw"
    )
    destination = tmp_path / "out"
    backend.transfer.export("disk", destination, destination_format=destination_format)
    assert images.info(destination)["format"] == destination_format
    compare = ["qemu-img", "compare", "-f", "raw", "-F", destination_format, source, destination]
    assert subprocess.run(compare, capture_output=True).returncode == 0
    assert KeyedImage.of(backend, disk).equals(destination, destination_format)
    with pytest.raises(DiskExistsError):
        backend.transfer.export("disk", destination)


def test_a_source_of_odd_length_is_padded(backend: Backend, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\x42" * 700)
    disk = backend.transfer.import_image(
        NewDisk(name="disk", format=DiskFormat.RAW), source, source_format="raw"
    )
    image = KeyedImage.of(backend, disk)
    assert disk.size == 1024
    assert image.has(0, 700, 0x42)
    assert image.has(700, 324, 0)


def lose_store(root: Path) -> None:
    for path in (root / "var/lib/virt-sse").glob("store.*"):
        path.unlink()


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_lost_store_is_rebuilt_from_the_images(root: Path, image_format: str) -> None:
    with Backend.open(root) as backend:
        initialise(backend.host)
        before = create(backend, "disk", M, image_format)
        KeyedImage.of(backend, before).write(0, M, 0x77)
    lose_store(root)
    with Backend.open(root) as backend:
        assert backend.disks.all() == []
        assert backend.disks.adopt(before.path) == before
        assert KeyedImage.of(backend, before).has(0, M, 0x77)
        backend.disks.check("disk")
        with pytest.raises(DiskExistsError):
            backend.disks.adopt(before.path)


def test_a_disk_is_adopted_under_another_name(root: Path) -> None:
    with Backend.open(root) as backend:
        initialise(backend.host)
        path = create(backend, "disk").path
    lose_store(root)
    with Backend.open(root) as backend:
        create(backend, "other", M, "raw")
        with pytest.raises(DiskExistsError, match="name 'other'"):
            backend.disks.adopt(path, name="other")
        with pytest.raises(InvalidValueError):
            backend.disks.adopt(path, name="../disk")
        assert backend.disks.adopt(path, name="renamed").name == "renamed"
        assert [disk.name for disk in backend.disks.all()] == ["other", "renamed"]


def test_a_moved_disk_is_found_and_a_copied_one_is_not_taken(backend: Backend, root: Path) -> None:
    disk = create(backend, "disk")
    elsewhere = root / "elsewhere.qcow2"
    shutil.copy(disk.path, elsewhere)
    with pytest.raises(DiskExistsError, match="the store has this disk"):
        backend.disks.adopt(elsewhere)
    disk.path.unlink()
    assert backend.disks.adopt(elsewhere).path == elsewhere
    assert backend.disks.get("disk").path == elsewhere
    backend.disks.check("disk")


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_disk_in_use_can_be_adopted(root: Path, image_format: str) -> None:
    with Backend.open(root) as backend:
        initialise(backend.host)
        disk = create(backend, "disk", M, image_format)
        image = KeyedImage.of(backend, disk)
    lose_store(root)
    with image.served(), Backend.open(root) as backend:
        assert backend.disks.adopt(disk.path) == disk


@pytest.mark.slow
def test_another_host_cannot_adopt_a_disk(backend: Backend, virt_sse: CommandLine, tmp_path: Path) -> None:
    disk = create(backend, "disk")
    with Backend.open(tmp_path / "other") as other:
        initialise(other.host)
    theirs = CommandLine(tmp_path / "other")
    assert "sealed by another host" in theirs.refuses("disk", "adopt", disk.path)
    message = theirs.refuses("disk", "adopt", disk.path, "--trust")
    assert "no version" in message
    assert "another host's keyring" in message
    assert virt_sse("disk", "check", "disk") == "disk disk: ok\n"


def test_growing_and_shrinking_keep_the_data(backend: Backend) -> None:
    for image_format in FORMATS:
        disk = create(backend, image_format, 2 * M, image_format)
        image = KeyedImage.of(backend, disk)
        image.write(0, 2 * M, 0x21)
        assert backend.disks.resize(image_format, 5 * M + 512).size == image.size() == 5 * M + 512
        assert image.has(0, 2 * M, 0x21)
        with pytest.raises(InvalidValueError, match="more than"):
            backend.disks.resize(image_format, M)
        assert backend.disks.resize(image_format, M, shrink=True).size == image.size() == M
        assert image.has(0, M, 0x21)
        assert backend.disks.resize(image_format, M).size == M
        backend.disks.check(image_format)


def test_a_resize_by_another_program_is_seen(backend: Backend) -> None:
    for image_format in FORMATS:
        disk = create(backend, image_format, M, image_format)
        image = KeyedImage.of(backend, disk)
        resize = ["qemu-img", "resize", "-q", "--object", image.secret, "--image-opts", image.options, "3M"]
        subprocess.run(resize, check=True)
        assert [listed.size for listed in backend.disks.all() if listed.id == disk.id] == [M]
        assert backend.disks.get(image_format).size == 3 * M
    assert [disk.size for disk in backend.disks.all()] == [3 * M, 3 * M]


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_open_disk_is_left_alone(backend: Backend, tmp_path: Path, image_format: str) -> None:
    disk = create(backend, "disk", M, image_format)
    image = KeyedImage.of(backend, disk)
    image.write(0, M, 0x33)
    with image.served():
        for refused in (
            lambda: backend.disks.resize("disk", 2 * M),
            lambda: backend.disks.check("disk"),
            lambda: backend.transfer.export("disk", tmp_path / "out"),
            lambda: backend.disks.erase(disk),
        ):
            with pytest.raises(DiskInUseError, match="in use"):
                refused()
    assert not (tmp_path / "out").exists()
    for read_only in (False, True):
        with image.held(read_only=read_only):
            for refused in (
                lambda: backend.disks.resize("disk", M - 512, shrink=True),
                lambda: backend.disks.check("disk"),
                lambda: backend.disks.erase(disk, dry_run=True),
            ):
                with pytest.raises(DiskInUseError, match="in use"):
                    refused()
    assert image.has(0, M, 0x33)
    backend.disks.erase(disk, dry_run=True)
    backend.disks.check("disk")


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_deleted_disk_cannot_be_opened_by_anyone(
    backend: Backend, root: Path, tmp_path: Path, image_format: str
) -> None:
    disk = create(backend, "disk", M, image_format)
    kept_aside = tmp_path / "kept"
    os.link(disk.path, kept_aside)
    image = KeyedImage(kept_aside, image_format, images.passphrase(backend, disk))
    ciphertext = disk.deks[0].wrapped.ciphertext
    assert image.opens()
    keyslot = images.luks_volume(disk, tmp_path).read_bytes()[4096 : 4096 + 256]
    assert images.contains([kept_aside], keyslot) == [kept_aside]

    backend.disks.erase(disk)

    assert not image.opens()
    assert images.files_below(disk.path.parent) == []
    assert not images.contains([kept_aside], keyslot, b"LUKS\xba\xbe", b"virt-sse")
    assert backend.disks.all() == []
    assert backend.keys.in_use() == []
    state = [path for path in (root / "var/lib/virt-sse").rglob("*") if path.is_file()]
    backend.close()  # the write-ahead log goes into the store
    assert not images.contains([path for path in state if path.exists()], ciphertext)


@pytest.mark.parametrize("trick", ["renamed", "linked", "backed"])
def test_a_source_exchanged_after_its_check_brings_no_other_file_into_the_disk(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str
) -> None:
    """A user who may write the source read any file of root so."""
    secret = images.make_plain(tmp_path / "secret", "raw", b"\x53" * M)
    hostile = images.make_plain(tmp_path / "hostile", "qcow2", bytes(M))
    rebase = ["qemu-img", "rebase", "-u", "-b", secret, "-F", "raw"]
    subprocess.run([*rebase, hostile], check=True)
    source = tmp_path / "source"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source, "1M"], check=True)

    def exchange(*arguments: Any, **options: Any) -> img.ImageInfo:
        checked = info(*arguments, **options)
        if trick == "renamed":
            hostile.rename(source)
        elif trick == "linked":
            source.unlink()
            source.symlink_to(hostile)
        else:
            subprocess.run([*rebase, source], check=True)
        return checked

    info = img.info
    monkeypatch.setattr(img, "info", exchange)
    if trick == "backed":
        disk = backend.transfer.import_image(NewDisk(name="disk"), source)
        assert KeyedImage.of(backend, disk).has(0, M, 0)
    else:
        with pytest.raises(ImageError, match="removed or replaced while in use"):
            backend.transfer.import_image(NewDisk(name="disk"), source)
        assert backend.disks.all() == []


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_planted_for_an_interrupted_deletion_is_not_followed(
    backend: Backend, root: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """Users who may write the images' folder made root overwrite any file so."""
    disk = create(backend, "disk")
    doomed = disk.path.with_name(f".{disk.id}.erased")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    backend.host.store.set_state(disk.id, DiskState.DELETING)
    disk.path.unlink()
    link(doomed, victim)
    backend.disks.recover()
    assert victim.read_bytes() == b"precious"
    if doomed.exists():  # a hard link may be the disk's image: the administrator decides
        doomed.unlink()
        backend.disks.recover()
    assert backend.disks.all() == []
    assert images.files_below(disk.path.parent) == []


def test_a_link_put_in_place_of_the_image_during_its_deletion_is_not_followed(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = create(backend, "disk")
    victim, stolen = tmp_path / "victim", tmp_path / "stolen"
    victim.write_bytes(b"precious")
    image = KeyedImage(stolen, "qcow2", images.passphrase(backend, disk))

    def swap(_folder: Path) -> None:
        doomed = disk.path.with_name(f".{disk.id}.erased")
        if doomed.exists() and not stolen.exists():
            doomed.rename(stolen)
            doomed.symlink_to(victim)

    monkeypatch.setattr(erasure, "sync_folder", swap)
    backend.disks.erase(disk)
    assert victim.read_bytes() == b"precious"
    assert not image.opens(), "the image is erased, wherever it is"
    assert images.files_below(disk.path.parent) == []


def test_a_file_that_is_not_the_disks_image_is_not_deleted(backend: Backend) -> None:
    disk = create(backend, "disk")
    whole = disk.path.read_bytes()
    other = create(backend, "other")
    for foreign in (b"", b"a letter", other.path.read_bytes(), whole[:5000]):
        disk.path.write_bytes(foreign)
        with pytest.raises(ImageError, match="not the image of disk 'disk'"):
            backend.disks.erase(disk)
        assert disk.path.read_bytes() == foreign
    disk.path.write_bytes(whole)
    backend.disks.check("disk")
    disk.path.unlink()
    backend.disks.erase(disk)
    with pytest.raises(DiskNotFoundError):
        backend.disks.get("disk")


def test_a_disk_is_found_by_its_id(backend: Backend) -> None:
    disk = create(backend, "disk")
    assert backend.disks.get(str(disk.id)) == disk
    assert image_state(disk) == "present"
    disk.path.unlink()
    assert image_state(disk) == f"image {disk.path} is missing"
