"""Looking for in-guest encryption in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from virt_sse.in_guest.inspection import inspect
from virt_sse.model.content import Finding
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import reading


def in_image(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> list[Finding]:
    """What a guest has encrypted on the disk in the image at *path*, which *deks* open.

    :raise ImageError: When it cannot be read.
    :raise ToolError: When it does not open.
    """
    with reading.plaintext(path, image_format, deks) as reader:
        return inspect(reader.read, reader.size)


def in_unencrypted_image(path: Path, image_format: str) -> list[Finding]:
    """The same for an image, or block device, that is not encrypted; *image_format* is QEMU's name for it.

    :raise ImageError: When it cannot be read.
    :raise ToolError: When it is no such image.
    """
    with reading.unencrypted(path, image_format) as reader:
        return inspect(reader.read, reader.size)
