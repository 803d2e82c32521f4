"""Detection of in-guest encryption in images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from virt_sse.in_guest.inspection import inspect
from virt_sse.model.content import Finding
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import reading
from virt_sse.qemu.backing_chain import opened_chain
from virt_sse.qemu.serving import served
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.system.confinement import BoundFile


def in_image(
    path: Path, image_format: DiskFormat, deks: Sequence[Dek], *, base: BaseImage | None = None
) -> list[Finding]:
    """Find in-guest encryption on the disk in the image at *path*, unlocked by *deks*.

    :param base: the image below.
    :raise ImageError: When the image cannot be read.
    :raise ToolError: When *deks* do not unlock the image.
    """
    with reading.plaintext(path, image_format, deks, base=base) as reader:
        return inspect(reader.read, reader.size)


def in_unencrypted_image(
    path: Path, image_format: str, *, descriptor: int, others: Sequence[BoundFile] | None = None
) -> list[Finding]:
    """Find in-guest encryption in an unencrypted image or block device.

    :param image_format: QEMU's name of the format.
    :param descriptor: descriptor of the image.
    :param others: as for :func:`~virt_sse.qemu.reading.unencrypted`.
    :raise ImageError: When the image cannot be read.
    :raise ToolError: When the image is not in *image_format*.
    """
    with reading.unencrypted(path, image_format, descriptor=descriptor, others=others) as reader:
        return inspect(reader.read, reader.size)


def in_unencrypted_chain(path: Path, image_format: str) -> list[Finding]:
    """Find in-guest encryption in an unencrypted image with its backing files, also in use.

    :raise ImageError: When the chain is refused (:func:`~virt_sse.qemu.backing_chain.opened_chain`).
    :raise ToolError: When an image is not in its format.
    """
    with (
        opened_chain(path, image_format, shared=True) as chain,
        served(chain.source.node, [], [], chain.source.files) as reader,
    ):
        return inspect(reader.read, reader.size)
