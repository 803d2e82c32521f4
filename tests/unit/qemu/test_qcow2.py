from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from virt_sse.errors import ImageFormatError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.keys import Dek
from virt_sse.qemu.luks import make_header
from virt_sse.qemu.qcow2 import Qcow2Header, add_luks_header

DEK = Dek.generate()


@pytest.fixture(scope="module")
def luks() -> bytes:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    return make_header(AES_256_XTS, DEK)


def fresh(path: Path, size: str = "1M", *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True)
    return path


def add(path: Path, luks: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        add_luks_header(descriptor, luks)
    finally:
        os.close(descriptor)


def read(path: Path) -> Qcow2Header:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return Qcow2Header.read(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", ["512", "1M", "10G", "64T"])
@pytest.mark.parametrize("cluster_size", ["64k", "2M"])
def test_a_fresh_image_becomes_an_encrypted_one(
    luks: bytes, tmp_path: Path, size: str, cluster_size: str
) -> None:
    path = fresh(tmp_path / "image", size, "-o", f"cluster_size={cluster_size}")
    assert read(path).luks is None
    add(path, luks)
    offset, length = read(path).luks or (0, 0)
    assert offset % read(path).cluster_size == 0
    assert length == len(luks)
    content = path.read_bytes()[offset:]
    assert content[: len(luks)] == luks
    assert images.info(path)["encrypted"]
    image = images.KeyedImage(path, "qcow2", DEK.passphrase)
    image.write(0, 512, 0x55)
    assert image.has(0, 512, 0x55)
    check = ["qemu-img", "check", "-q", "--object", image.secret, "--image-opts", image.options]
    assert subprocess.run(check).returncode == 0


def test_a_backing_file_keeps_its_name(luks: bytes, tmp_path: Path) -> None:
    """As an overlay's, later: its name lies where the extension goes."""
    base = fresh(tmp_path / "base")
    path = fresh(tmp_path / "overlay", "1M", "-b", str(base), "-F", "qcow2")
    add(path, luks)
    assert images.info(path)["backing-filename"] == str(base)
    assert images.KeyedImage(path, "qcow2", DEK.passphrase).opens()


def test_only_a_fresh_image_is_taken(luks: bytes, tmp_path: Path) -> None:
    path = fresh(tmp_path / "image")
    add(path, luks)
    before = path.read_bytes()
    with pytest.raises(ImageFormatError, match="only a fresh"):
        add(path, luks)
    assert path.read_bytes() == before
    with pytest.raises(ImageFormatError, match="only a fresh"):
        add(fresh(tmp_path / "bits", "1M", "-o", "refcount_bits=1"), luks)


def patched(offset: int, layout: str, value: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        copy = bytearray(content)
        struct.pack_into(layout, copy, offset, value)
        return bytes(copy)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda _: b"QFI\xfb",
        lambda content: content[:103],
        lambda content: content[:112],
        lambda content: b"XFI\xfb" + content[4:],
        patched(4, ">I", 2),
        patched(20, ">I", 8),
        patched(20, ">I", 22),
        patched(20, ">I", 0xFFFFFFFF),
        patched(100, ">I", 0),
        patched(100, ">I", 0xFFFFFFFF),
        patched(116, ">I", 0xFFFFFFFF),
    ],
)
def test_a_damaged_image_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    images.require("qemu-img")
    path = fresh(tmp_path / "image")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ImageFormatError):
        read(path)


def test_an_extension_of_the_wrong_length_names_no_header(luks: bytes, tmp_path: Path) -> None:
    path = fresh(tmp_path / "image")
    add(path, luks)
    content = path.read_bytes()
    position = content.index(struct.pack(">II", 0x0537BE77, 16))
    path.write_bytes(patched(position + 4, ">I", 8)(content))
    assert read(path).luks is None
