"""Random access to the plaintext of an image, also while a domain has the image open.

If a domain is writing to the image, all data flushed by the guest is visible; later writes may be.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from virt_sse.errors import ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import img
from virt_sse.qemu.nbd import NbdReader
from virt_sse.qemu.serving import served


@contextlib.contextmanager
def plaintext(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> Iterator[NbdReader]:
    """Open the plaintext of the encrypted image at *path*.

    :raise ImageError: When the image is damaged or cannot be read.
    :raise ToolError: When *deks* do not unlock the image.
    """
    with (
        img.keys_to(path, image_format, deks) as (secrets, descriptors),
        served(img.block_node(path, image_format, len(deks)), secrets, descriptors) as reader,
    ):
        yield reader


@contextlib.contextmanager
def unencrypted(path: Path, image_format: str, *, descriptor: int | None = None) -> Iterator[NbdReader]:
    """Open the content of the unencrypted image or block device at *path*.

    :param image_format: QEMU's name of the format.
    :param descriptor: descriptor to open the image by, without a backing file.
    :raise ImageError: When *path* cannot be read.
    :raise ToolError: When the image is not in *image_format*.
    """
    if descriptor is not None:
        with served(img.node_without_backing(descriptor, image_format), [], [descriptor]) as reader:
            yield reader
        return
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ImageError(f"{path} is neither a file nor a block device")
    driver = "host_device" if stat.S_ISBLK(mode) else "file"
    file = {"driver": driver, "filename": str(path)}
    node: dict[str, object] = {"driver": image_format, "file": file}
    with served(node, [], []) as reader:
        yield reader
