from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import folders
from support.faults import crash_points, dies_at
from virt_sse.errors import EnvelopeError, ImageFormatError
from virt_sse.model import envelope
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import SLOT_BYTES, SLOT_OFFSETS, Envelope
from virt_sse.model.seal import SEAL_BYTES, SEAL_OFFSETS
from virt_sse.qemu import envelope_slots
from virt_sse.qemu.luks import FIRST_KEYSLOT, HEADER_END
from virt_sse.system import files

VECTORS = json.loads((folders.VECTORS / "envelope.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}


def image(path: Path, slots: list[str]) -> Path:
    """A raw LUKS image whose header carries *slots*, its gap otherwise full of other bytes."""
    content = bytearray(bytes.fromhex(VECTORS["luks-header"]).ljust(FIRST_KEYSLOT, b"\xee") + bytes(4096))
    for offset, slot in zip(SLOT_OFFSETS, slots, strict=True):
        content[offset : offset + SLOT_BYTES] = bytes.fromhex(slot).ljust(SLOT_BYTES, b"\0")
    path.write_bytes(content)
    os.truncate(path, 4 << 20)  # room for the keyslots
    return path


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """An image with an envelope of generation 7."""
    opened = os.open(image(tmp_path / "image", CASES["both slots alike"]["slots"]), os.O_RDWR)
    yield opened
    os.close(opened)


def read(path: Path) -> Envelope:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return envelope_slots.read(descriptor, DiskFormat.RAW)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", CASES)
def test_the_vectors_are_read_as_recorded(name: str, tmp_path: Path) -> None:
    """What was written once is read for ever, and what is wrong gives the reason."""
    path = image(tmp_path / "image", CASES[name]["slots"])
    expected = CASES[name]["expected"]
    if "error" in expected:
        with pytest.raises(EnvelopeError) as caught:
            read(path)
        assert str(caught.value).startswith(expected["error"])
        return
    found = read(path)
    assert found.generation == expected["generation"]
    assert [entry.wrapped.key.version for entry in found.deks] == [expected["key-version"]]
    assert (found.name, str(found.disk_id)) == ("db-01", "6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")
    assert found.deks[0].wrapped.ciphertext == bytes(range(found.generation, found.generation + 72))


def test_the_slots_lie_in_the_gap() -> None:
    first, second = SLOT_OFFSETS
    assert SEAL_OFFSETS[0] >= HEADER_END
    assert SEAL_OFFSETS[0] + SEAL_BYTES <= SEAL_OFFSETS[1]
    assert SEAL_OFFSETS[1] + SEAL_BYTES <= first
    assert first + SLOT_BYTES <= second
    assert second + SLOT_BYTES <= FIRST_KEYSLOT


def test_a_written_envelope_is_read_back(descriptor: int) -> None:
    before = os.pread(descriptor, 1 << 20, 0)
    found = envelope_slots.read(descriptor, DiskFormat.RAW)
    newer = dataclasses.replace(found, generation=8, name="n" * 80)
    envelope_slots.write(descriptor, DiskFormat.RAW, newer)
    assert envelope_slots.read(descriptor, DiskFormat.RAW) == newer
    after = os.pread(descriptor, 1 << 20, 0)
    assert after[: SEAL_OFFSETS[0]] == before[: SEAL_OFFSETS[0]]
    assert after[FIRST_KEYSLOT:] == before[FIRST_KEYSLOT:]
    old = bytes.fromhex(CASES["both slots alike"]["slots"][0])
    assert old[20:] not in after


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["first slot newer", "second slot newer, the first not replaced yet", "empty"]
)
def test_a_write_that_is_killed_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    newer = dataclasses.replace(read(image(path, CASES["both slots alike"]["slots"])), generation=8)

    def write() -> None:
        descriptor = os.open(path, os.O_RDWR)
        envelope_slots.write(descriptor, DiskFormat.RAW, newer)
        os.close(descriptor)

    image(path, CASES[name]["slots"])
    seen = set()
    modules = [envelope, envelope_slots, files]
    for point in crash_points(modules, write):
        image(path, CASES[name]["slots"])
        assert dies_at(point, modules, write)
        try:
            seen.add(read(path).generation)
        except EnvelopeError:
            assert name == "empty"
            seen.add(0)
    assert seen == ({0, 8} if name == "empty" else {7, 8})


def test_a_write_that_is_torn_anywhere_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Of the slot that is written first, any part may have reached the storage."""
    old = CASES["both slots alike"]["slots"]
    newer = dataclasses.replace(read(image(tmp_path / "image", old)), generation=8).encode()
    for written in range(0, SLOT_BYTES, 13):
        torn = (newer[:written] + bytes.fromhex(old[1]).ljust(SLOT_BYTES, b"\0")[written:]).hex()
        assert read(image(tmp_path / "image", [old[0], torn])).generation in (7, 8)
        assert read(image(tmp_path / "image", [torn, old[1]])).generation in (7, 8)


def test_an_envelope_that_does_not_fit_is_refused_and_not_written(descriptor: int) -> None:
    before = os.pread(descriptor, 1 << 20, 0)
    found = envelope_slots.read(descriptor, DiskFormat.RAW)
    with pytest.raises(EnvelopeError, match="has room for"):
        envelope_slots.write(descriptor, DiskFormat.RAW, dataclasses.replace(found, deks=found.deks * 8))
    assert os.pread(descriptor, 1 << 20, 0) == before


def test_two_deks_under_rsa_4096_fit(descriptor: int) -> None:
    """What double encryption with a customer's and the platform's key needs."""
    found = envelope_slots.read(descriptor, DiskFormat.RAW)
    (entry,) = found.deks
    vault = dataclasses.replace(
        entry.wrapped.key,
        name="https://a-rather-long-vault-name.vault.example/keys/a-key-name",
        version="0" * 32,
    )
    rsa = dataclasses.replace(entry.wrapped, ciphertext=bytes(512), algorithm="RSA-OAEP-256", key=vault)
    deks = (dataclasses.replace(entry, wrapped=rsa), entry)
    assert len(dataclasses.replace(found, deks=deks, name="n" * 80).encode()) == SLOT_BYTES


def test_an_image_without_a_luks_header_has_no_envelope(tmp_path: Path) -> None:
    for content in (b"", b"text", bytes(8192)):
        (tmp_path / "image").write_bytes(content)
        with pytest.raises(ImageFormatError):
            read(tmp_path / "image")
