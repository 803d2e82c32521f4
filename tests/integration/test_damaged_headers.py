"""LUKS headers and envelopes that were altered, by accident or by someone who can write to the image."""

from __future__ import annotations

import os

import pytest

from support import images
from support.faults import EVERY_KILL
from virt_sse.backend import Backend
from virt_sse.errors import ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk

M = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_header_with_any_byte_flipped_never_opens_wrongly(backend: Backend, image_format: str) -> None:
    """Either there is an error, or the byte meant nothing and the content is what it was."""
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat(image_format)))
    image = images.KeyedImage.of(backend, disk)
    image.write(0, 4096, 0x44)
    image.write(M - 512, 512, 0x45)
    start = disk.path.read_bytes().index(b"LUKS\xba\xbe")
    every = 1 if EVERY_KILL else 3 if image_format == "raw" else 7
    opened = []
    meaningful = {*range(11), *range(40, 51), *range(72, 78), *range(104, 168), *range(208, 256)}
    with disk.path.open("r+b", buffering=0) as file:
        for position in range(start, start + 592, every):
            (byte,) = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), position)
            try:
                backend.disks.check("disk")
            except ImageError:
                pass
            else:
                opened.append(position - start)
                done = image.io("read -P 0x44 0 4096", f"read -P 0x45 {M - 512} 512")
                assert done.returncode == 0, (position - start, done.stderr)
                assert "failed" not in done.stdout, position - start
            os.pwrite(file.fileno(), bytes([byte]), position)
    backend.disks.check("disk")
    assert backend.disks.all() == [disk]
    assert not meaningful & set(opened)
