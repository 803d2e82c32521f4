"""What is seen of caches, images and processes."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from support.images import require
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, image_file
from virt_sse.qemu.formatting import Volume
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.system.running_process import command_line
from virt_sse.verification.processes import has_open, identity, listens_at, open_files
from virt_sse.verification.sector_sample import (
    SECTORS,
    SectorSample,
    is_decrypted_hole,
    is_even,
    is_table,
    sample_sectors,
)

TEXT = b"virt-sse boot-sector marker: not to be found in the raw image. "


@pytest.fixture
def cache() -> Iterator[int]:
    with TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        yield file.fileno()


def test_ciphertext_is_told_from_plaintext(cache: int) -> None:
    os.pwrite(cache, os.urandom(64 << 10), 128 << 10)
    assert sample_sectors(cache, [0], has_tables=True) == SectorSample(128, 0, 0)
    os.pwrite(cache, (TEXT * 200)[: 8 << 10], 512 << 10)
    seen = sample_sectors(cache, [0], has_tables=True)
    assert (seen.ciphertext, seen.other) == (128, 16)


def test_headers_do_not_count_as_plaintext(cache: int) -> None:
    os.pwrite(cache, b"LUKS" + TEXT, 0)
    os.pwrite(cache, b"LUKS" + TEXT, 64 << 10)
    assert sample_sectors(cache, [0, 64 << 10], has_tables=False) == SectorSample(0, 2, 0)
    assert sample_sectors(cache, [0], has_tables=False) == SectorSample(0, 1, 1)


def test_tables_of_the_format_do_not_count_as_plaintext(cache: int) -> None:
    offsets = struct.pack(">64Q", *((1 << 63) | (number << 16) for number in range(16)), *[0] * 48)
    counts = struct.pack(">256H", *([1] * 200), *([0] * 56))
    os.pwrite(cache, offsets + counts, 64 << 10)
    assert sample_sectors(cache, [0], has_tables=True) == SectorSample(0, 2, 0)
    assert sample_sectors(cache, [0], has_tables=False) == SectorSample(0, 0, 2)
    assert not is_table(struct.pack(">64Q", *([1 << 40] * 64)), 1 << 20), "beyond the end"
    assert not is_table((TEXT * 9)[:512], 1 << 20)


def test_decrypted_holes_of_a_sparse_image_are_no_plaintext(cache: int) -> None:
    cipher = Cipher(AES(os.urandom(32)), CBC(bytes(16))).decryptor()
    hole = cipher.update(bytes(512))
    os.pwrite(cache, hole * 4, 64 << 10)
    assert is_decrypted_hole(hole)
    assert not is_decrypted_hole(os.urandom(512))
    assert not is_decrypted_hole((TEXT * 9)[:512])
    assert sample_sectors(cache, [], has_tables=False, has_holes=True) == SectorSample(0, 0, 0)
    assert sample_sectors(cache, [], has_tables=False) == SectorSample(0, 0, 4)


def test_a_sample_of_much_is_spread_over_it() -> None:
    with TemporaryFile() as file:
        os.ftruncate(file.fileno(), 64 << 20)
        os.pwrite(file.fileno(), os.urandom(2 << 20), 0)
        os.pwrite(file.fileno(), TEXT * 20000, 32 << 20)
        seen = sample_sectors(file.fileno(), [], has_tables=True)
    assert SECTORS // 2 < seen.ciphertext + seen.other <= SECTORS
    assert seen.other > 100


def test_ciphertext_is_even_and_text_is_not() -> None:
    assert all(is_even(os.urandom(512)) for _ in range(2000))
    assert not is_even(bytes(512))
    assert not is_even((TEXT * 9)[:512])


@pytest.mark.parametrize("image_format", list(DiskFormat))
@pytest.mark.parametrize("double", [False, True])
def test_the_cipher_is_read_from_the_header(tmp_path: Path, image_format: DiskFormat, double: bool) -> None:
    require("cryptsetup", "qemu-img")
    volumes = [Volume(AES_256_XTS, Dek.generate()), Volume(AES_256_CBC, Dek.generate())]
    formatting.make(tmp_path / "image", image_format, 1 << 20, volumes[: 1 + double])
    with image_file.opened(tmp_path / "image") as descriptor:
        cipher = AES_256_CBC if double else AES_256_XTS
        assert VolumeHeader.of_file(descriptor, image_format).cipher == cipher


def test_the_files_a_process_has_open_are_found(tmp_path: Path) -> None:
    path, address = tmp_path / "file", tmp_path / "socket"
    path.write_bytes(b"x")
    with path.open() as file, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        assert not listens_at(os.getpid(), address)
        listening.listen()
        assert listens_at(os.getpid(), address)
        assert not listens_at(1, address)
        assert has_open(os.getpid(), path)
        path.rename(tmp_path / "moved")
        path.write_bytes(b"x")
        assert not has_open(os.getpid(), path)
        assert has_open(os.getpid(), tmp_path / "moved")
        (tmp_path / "moved").unlink()
        (found,) = (each for each in open_files(os.getpid()) if each.descriptor == file.fileno())
        assert found.is_unnamed
        assert found.name == str(tmp_path / "moved")
    assert identity(tmp_path / "nowhere") is None
    assert not has_open(os.getpid(), tmp_path / "nowhere")
    assert "python" in command_line(os.getpid())[0]
    assert open_files(1 << 30) == command_line(1 << 30) == []
