"""Key rotation: every disk's DEK under the new version, in the store and in its image; no data touched."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.images import FORMATS, KeyedImage
from virt_sse.backend import Backend
from virt_sse.errors import EnvelopeError, ImageFormatError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.envelope import Envelope
from virt_sse.model.keys import KeyRef
from virt_sse.model.seal import SEAL_OFFSETS, SealKey
from virt_sse.qemu import envelope_slots

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.fixture
def disks(backend: Backend) -> list[Disk]:
    made = [backend.disks.create(NewDisk(name=name, size=M, format=DiskFormat(name))) for name in FORMATS]
    for number, disk in enumerate(made, start=1):
        KeyedImage.of(backend, disk).write(0, M, number)
    return made


def ciphertexts(disks: list[Disk]) -> list[bytes]:
    return [entry.wrapped.ciphertext for disk in disks for entry in disk.deks]


def base64s(disks: list[Disk]) -> list[bytes]:
    return [base64.b64encode(ciphertext) for ciphertext in ciphertexts(disks)]


@pytest.mark.slow
def test_every_disk_comes_under_the_new_version(backend: Backend, disks: list[Disk], root: Path) -> None:
    before = {disk.path: disk.path.read_bytes() for disk in disks}
    keys = [images.passphrase(backend, disk) for disk in disks]
    old = backend.keys.in_use()[0].key

    version, report = backend.keys.rotate(PLATFORM_KEY)

    assert (report.rewrapped, report.current, report.failed) == (2, 0, {})
    assert version != old
    assert [(use.key, use.deks) for use in backend.keys.in_use()] == [(version, 2)]
    after = backend.disks.all()
    for disk, key in zip(after, keys, strict=True):
        assert [entry.wrapped.key for entry in disk.deks] == [version]
        assert disk.generation == 2
        assert images.passphrase(backend, disk) == key
        content = disk.path.read_bytes()
        differing = [i for i, (a, b) in enumerate(zip(content, before[disk.path], strict=True)) if a != b]
        start = content.index(b"LUKS\xba\xbe")
        assert differing
        assert start + SEAL_OFFSETS[0] <= min(differing) <= max(differing) < start + 4096
        backend.disks.check(disk.name)
    assert not images.contains([disk.path for disk in disks], *base64s(disks))
    assert [KeyedImage.of(backend, disk).has(0, M, n) for n, disk in enumerate(disks, start=1)] == [True] * 2
    backend.close()  # the write-ahead log goes into the store
    assert not images.contains([root / "var/lib/virt-sse/store.sqlite"], *ciphertexts(disks))


def test_a_second_run_finds_nothing_to_do(backend: Backend, disks: list[Disk]) -> None:
    backend.keys.rotate(PLATFORM_KEY)
    before = [disk.path.read_bytes() for disk in disks]
    progress: list[float] = []
    report = backend.keys.rewrap(PLATFORM_KEY, progress=progress.append)
    assert (report.rewrapped, report.current, report.failed) == (0, 2, {})
    assert [disk.path.read_bytes() for disk in disks] == before
    assert progress[-1] == 1.0


def test_many_rotations_leave_one_generation_in_the_header(backend: Backend, disks: list[Disk]) -> None:
    for _ in range(5):
        backend.keys.rotate(PLATFORM_KEY)
    for disk in backend.disks.all():
        assert disk.generation == 6
        content = disk.path.read_bytes()
        start = content.index(b"LUKS\xba\xbe")
        assert content[start + 1024 : start + 2560] == content[start + 2560 : start + 4096]
        backend.disks.check(disk.name)


@pytest.mark.slow
def test_a_key_without_disks_rotates_and_an_unknown_key_does_not(
    backend: Backend, virt_sse: CommandLine
) -> None:
    _, report = backend.keys.rotate(PLATFORM_KEY)
    assert (report.rewrapped, report.current) == (0, 0)
    for verb in ("rotate", "rewrap"):
        assert "no key 'other'" in virt_sse.refuses("key", verb, "other", "--provider", "platform-managed")
        assert "no key provider named 'other'" in virt_sse.refuses("key", verb, "--provider", "other")


def test_a_missing_image_is_reported_and_mended_later(
    backend: Backend, disks: list[Disk], virt_sse: CommandLine
) -> None:
    missing = disks[1]
    aside = missing.path.with_name("aside")
    missing.path.rename(aside)
    document = json.loads(virt_sse("key", "rotate", "--provider", "platform-managed", "-o", "json", status=1))
    assert document["rewrapped"] == 1
    (failed,) = document["failed"]
    assert failed["disk"] == missing.name
    assert "is missing" in failed["reason"]
    assert len(backend.keys.in_use()) == 1  # the store's are all under the new version
    aside.rename(missing.path)
    with pytest.raises(EnvelopeError, match="differs from the store"):
        backend.disks.check(missing.name)
    report = backend.keys.rewrap(PLATFORM_KEY)
    assert (report.rewrapped, report.current, report.failed) == (1, 1, {})
    backend.disks.check(missing.name)
    assert not images.contains([missing.path], *base64s(disks))


def test_a_damaged_envelope_is_mended_once_trusted_and_a_foreign_image_left_alone(
    backend: Backend, disks: list[Disk], tmp_path: Path
) -> None:
    disk = disks[1]
    assert disk.format is DiskFormat.RAW
    whole = disk.path.read_bytes()
    disk.path.write_bytes(whole[:1024] + bytes(3072) + whole[4096:])
    (reason,) = backend.keys.rewrap(PLATFORM_KEY).failed.values()
    assert "not the last known image" in reason, "an older image may hide behind a wiped envelope"
    backend.disks.trust(disk.name)
    backend.disks.check(disk.name)
    assert disk.path.read_bytes()[1024:] == whole[1024:]

    foreign = tmp_path / "foreign"
    foreign.write_bytes(bytes(4 * M))
    made = images.cryptsetup(
        "luksFormat", "--batch-mode", "--type", "luks1", "--pbkdf-force-iterations", "1000",
        "--align-payload", "8", "--key-size", "512", "--key-file", "-", foreign, stdin=b"theirs"
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    disk.path.write_bytes(foreign.read_bytes())
    (reason,) = backend.keys.rewrap(PLATFORM_KEY).failed.values()
    assert "does not open with its DEK" in reason
    assert disk.path.read_bytes() == foreign.read_bytes()
    with pytest.raises(ImageFormatError):
        backend.disks.check(disk.name)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_disk_in_use_is_rewrapped_under_its_user(
    backend: Backend, disks: list[Disk], image_format: str
) -> None:
    disk = backend.disks.get(image_format)
    image = KeyedImage.of(backend, disk)
    with image.served() as qmp:
        assert backend.keys.rotate(PLATFORM_KEY)[1].failed == {}
        assert qmp("query-named-block-nodes")
    assert image.has(0, M, FORMATS.index(image_format) + 1)
    backend.disks.check(image_format)


def test_the_listing_shows_each_key_with_its_disks(
    backend: Backend, disks: list[Disk], virt_sse: CommandLine
) -> None:
    key = backend.keys.in_use()[0].key
    (row,) = json.loads(virt_sse("key", "used", "-o", "json"))
    assert row == {
        "provider": "platform-managed",
        "name": "default",
        "version": key.version,
        "state": "enabled",
        "encryption-set": None,
        "deks": 2,
    }
    assert KeyRef(key.provider, key.name) == PLATFORM_KEY


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("odd"), TypeError("odd"), KeyError("odd")])
def test_one_bad_disk_does_not_stop_a_rotation(
    backend: Backend, disks: list[Disk], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = disks
    write, read_slots = envelope_slots.write, envelope_slots.read_slots

    def refused(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == bad.path.stat().st_ino:
            raise error

    def failing_write(
        descriptor: int, image_format: DiskFormat, envelope: Envelope, sealing: tuple[SealKey, int]
    ) -> None:
        refused(descriptor)
        write(descriptor, image_format, envelope, sealing)

    def failing_read(descriptor: int, image_format: DiskFormat) -> dict[str, Envelope]:
        refused(descriptor)
        return read_slots(descriptor, image_format)

    monkeypatch.setattr(envelope_slots, "write", failing_write)
    monkeypatch.setattr(envelope_slots, "read_slots", failing_read)
    version, report = backend.keys.rotate(PLATFORM_KEY)
    assert (report.rewrapped, report.failed) == (1, {bad.name: f"unexpected {type(error).__name__}"})
    assert [entry.wrapped.key for entry in backend.disks.get(good.name).deks] == [version]
    proofs = backend.keys.prove(backend.disks.all(), lambda _: None)
    assert {proof.disk for proof in proofs if proof.problem} == {bad.name}
    monkeypatch.undo()
    assert backend.keys.rewrap(PLATFORM_KEY).failed == {}
    for disk in disks:
        backend.disks.check(disk.name)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [2**63, 2**64 - 1])
def test_a_hostile_image_is_reported_and_the_others_are_rewrapped(
    backend: Backend, disks: list[Disk], virt_sse: CommandLine, offset: int
) -> None:
    bad = next(disk for disk in disks if disk.format is DiskFormat.QCOW2)
    images.rewrite_luks_pointer(bad.path, offset, 2**64 - 1)
    said = json.loads(virt_sse("key", "rotate", "--provider", "platform-managed", "-o", "json", status=1))
    assert said["rewrapped"] == len(disks) - 1
    assert [each["disk"] for each in said["failed"]] == [bad.name]
    assert "outside of the file" in said["failed"][0]["reason"]
    assert len(json.loads(virt_sse("disk", "list", "-o", "json"))) == len(disks)
