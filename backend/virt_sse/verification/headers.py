"""The ciphers of a disk's LUKS volumes, read from the headers of the volumes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from virt_sse.errors import ImageFormatError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.qemu import img, luks
from virt_sse.qemu.luks import Luks1Header
from virt_sse.qemu.qcow2 import Qcow2Header
from virt_sse.qemu.reading import plaintext
from virt_sse.system.files import write_at

_LARGEST_CLUSTER = 2 << 20


def cipher_of_image(descriptor: int, image_format: DiskFormat) -> str:
    """The cipher of the outermost volume of the open image, e.g. ``aes-256-xts``.

    :raise ImageFormatError: When the LUKS header is missing or damaged.
    """
    offset, _ = img.luks_area(descriptor, image_format)
    return _cipher(Luks1Header.parse(os.pread(descriptor, luks.HEADER_END, offset)))


def cipher_within(disk: Disk, deks: Sequence[Dek]) -> str:
    """The cipher of the disk's innermost volume. A separate process opens the outer volumes, read-only.

    :param deks: DEKs of the outer volumes, outermost last, i.e. all but the disk's first.
    :raise ImageError: When the image cannot be read.
    :raise ToolError: When *deks* do not unlock the outer volumes.
    """
    content = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        with plaintext(disk.path, disk.format, deks) as reader:
            write_at(content, reader.read(0, _LARGEST_CLUSTER), 0)
            os.ftruncate(content, reader.size)
            if disk.format is DiskFormat.QCOW2 and (area := Qcow2Header.read(content).luks):
                write_at(content, reader.read(area[0], luks.HEADER_END), area[0])
        return cipher_of_image(content, disk.format)
    except OSError as exc:
        raise ImageFormatError(f"{disk.path}: cannot open the outer layer: {exc.strerror}") from exc
    finally:
        os.close(content)


def _cipher(header: Luks1Header) -> str:
    """The cipher in the notation of :class:`~virt_sse.model.ciphers.Cipher`."""
    mode, _, generator = header.cipher_mode.partition("-")
    bits = header.volume_key_bytes * (4 if mode == "xts" else 8)  # xts takes two keys
    cipher = f"{header.cipher_name}-{bits}-{mode}"
    return cipher if generator == "plain64" else f"{cipher}-{generator}"
