"""Random access to the plaintext of an image, also while a domain has the image open.

If a domain is writing to the image, all data flushed by the guest is visible; later writes may be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import conversion, image_file, unlocking
from virt_sse.qemu.nbd import NbdReader
from virt_sse.qemu.serving import served
from virt_sse.system.confinement import BoundFile


@contextlib.contextmanager
def plaintext(
    path: Path, image_format: DiskFormat, deks: Sequence[Dek], *, base: unlocking.BaseImage | None = None
) -> Iterator[NbdReader]:
    """Open the plaintext of the encrypted image at *path*.

    :param base: the image below.
    :raise ImageError: When the image is damaged or cannot be read.
    :raise ToolError: When *deks* do not unlock the image.
    """
    with (
        unlocking.keys_to(path, image_format, deks, base=base) as keys,
        served(
            unlocking.block_node(path, image_format, len(deks), base=base),
            keys.secrets,
            keys.descriptors,
            keys.files,
        ) as reader,
    ):
        yield reader


@contextlib.contextmanager
def unencrypted(
    path: Path,
    image_format: str,
    *,
    descriptor: int | None = None,
    others: Sequence[BoundFile] | None = None,
) -> Iterator[NbdReader]:
    """Open the content of the unencrypted image or block device at *path*.

    :param image_format: QEMU's name of the format.
    :param descriptor: descriptor of the image, if already open.
    :param others: further files that the image may name, backing files included; by default none.
    :raise ImageError: When *path* cannot be read.
    :raise ToolError: When the image is not in *image_format*.
    """
    if descriptor is None:
        with (
            image_file.held(path) as held,
            unencrypted(path, image_format, descriptor=held, others=others) as reader,
        ):
            yield reader
        return
    node = conversion.node_without_backing(path, descriptor, image_format)
    if others is not None:
        node.pop("backing", None)
    with served(node, [], [], [*(others or ()), BoundFile(path, descriptor)]) as reader:
        yield reader
