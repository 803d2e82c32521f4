"""Images with a LUKS volume within another."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, image_file, img, qcow2
from virt_sse.qemu.formatting import Volume

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.parametrize("cipher", [AES_256_XTS, AES_256_CBC], ids=str)
def test_the_header_has_its_computed_length(tmp_path: Path, cipher: Cipher) -> None:
    formatting.make(tmp_path / "image", DiskFormat.RAW, M, [Volume(cipher, Dek.generate())])
    with image_file.opened(tmp_path / "image") as image:
        assert image_file.luks_area(image, DiskFormat.RAW) == (0, formatting.header_length(cipher))
    assert (tmp_path / "image").stat().st_size == formatting.header_length(cipher) + M


@pytest.mark.parametrize("size", [512, M + 512, 10 << 30])
def test_a_volume_within_a_volume_opens_with_both_deks(tmp_path: Path, size: int) -> None:
    for image_format in DiskFormat:
        path = tmp_path / image_format.value
        inner, outer = Dek.generate(), Dek.generate()
        formatting.make(path, image_format, size, [Volume(AES_256_XTS, inner), Volume(AES_256_CBC, outer)])
        assert images.mode(path) == 0o600
        assert img.usable_size_within(path, image_format, [inner, outer]) == size
        assert path.stat().st_blocks * 512 < 8 * M
        img.check(path, image_format, [inner, outer])
        room = img.usable_size_within(path, image_format, [outer])
        if image_format is DiskFormat.RAW:
            assert room == formatting.header_length(AES_256_XTS) + size
        else:
            assert room >= qcow2.most_room(size)
