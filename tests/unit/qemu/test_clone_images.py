"""Linked clones at the level of QEMU: an encrypted overlay whose header names no backing file."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import pytest

from support import images
from support.clone_images import CONTENT, QCOW2, M, daemon, filled, io, make
from support.images import FORMATS
from virt_sse.model.keys import Dek
from virt_sse.qemu import conversion, img
from virt_sse.qemu.qcow2 import Qcow2Header
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.system.progress import silent


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-storage-daemon", "qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("image_format", FORMATS)
def test_two_clones_of_one_image_at_once(tmp_path: Path, image_format: str, double: bool) -> None:
    base = filled(tmp_path, image_format, double=double)
    before = hashlib.sha256(base.path.read_bytes()).digest()
    clones = [make(tmp_path / name, "qcow2", double=double, size=2 * M) for name in ("one", "two")]
    whole = CONTENT + bytes(2 * M - len(CONTENT))
    assert clones[0].read(base) == whole
    assert clones[0].read() == bytes(2 * M), "the clone alone has nothing of the content"
    with clones[0].path.open("rb") as file:
        header = Qcow2Header.read(file.fileno())
    assert (header.backing_file_offset, header.backing_file_size) == (0, 0)
    with daemon(clones[0], base) as (first, one), daemon(clones[1], base) as (_, two):
        io(one, "write -P 0x55 512K 4K")
        assert "pattern" not in io(one, "read -P 0x55 512K 4K").lower()
        assert clones[1].read(base) == whole, "also while a daemon has the clone open"
        io(two, "write -z 0 4K")
        nodes, _, _ = first.block_graph()
        written = {str(node["node-name"]) for node in nodes if not node["ro"]}
        assert written == {"file", "volume", "exported", *(["volume1"] if double else [])}
        assert first.sizes()[0] == 2 * M
    assert hashlib.sha256(base.path.read_bytes()).digest() == before
    half = 512 << 10
    assert clones[0].read(base) == whole[:half] + b"\x55" * 4096 + whole[half + 4096 :]
    assert clones[1].read(base) == bytes(4096) + whole[4096:]
    for clone in clones:
        img.check(clone.path, clone.format, clone.deks)


def test_a_copy_of_a_clone_needs_no_base(tmp_path: Path) -> None:
    base = filled(tmp_path, "raw", double=True)
    clone = make(tmp_path / "clone", "qcow2", double=False, size=len(CONTENT))
    source = conversion.CopySource.encrypted(clone.path, clone.format, clone.deks, base=base)
    for image_format in FORMATS:
        copy = make(tmp_path / f"copy.{image_format}", image_format, double=True, size=len(CONTENT))
        conversion.copy_into(source, copy.path, copy.format, copy.deks, silent, is_new=True)
        assert copy.read() == CONTENT
        conversion.compare(source, copy.path, copy.format, copy.deks, silent)
    with (tmp_path / "plain-again").open("w+b") as target:
        conversion.decrypt_to(clone.path, QCOW2, target.fileno(), "raw", clone.deks, silent, base=base)
        assert target.read() == CONTENT


def test_a_clone_that_shrinks_and_grows_again_has_zeros_at_its_end(tmp_path: Path) -> None:
    base = filled(tmp_path, "qcow2", double=False)
    clone = make(tmp_path / "clone", "qcow2", double=False, size=2 * M)
    half = 512 << 10
    img.resize(clone.path, QCOW2, half, clone.deks, shrink=True, base=base)
    assert clone.read(base) == CONTENT[:half]
    img.resize(clone.path, QCOW2, 2 * M, clone.deks, shrink=False, base=base)
    assert clone.read(base) == CONTENT[:half] + bytes(2 * M - half)


def test_the_deks_of_a_base_are_not_shown() -> None:
    dek = Dek.generate()
    base = BaseImage(uuid.uuid4(), Path("/base"), QCOW2, (dek,))
    assert dek.passphrase.decode() not in repr(base)
