"""The header of a LUKS volume: its cipher, and a digest that notices a header rebuilt around the same DEK."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Self

from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.qemu import image_header
from virt_sse.qemu.image_header import Read
from virt_sse.qemu.luks import HEADER_END, Luks1Header
from virt_sse.qemu.qcow2 import Qcow2Header


@dataclass(frozen=True, slots=True)
class VolumeHeader:
    """A validated header.

    :ivar digest: 32 bytes, over the LUKS fields (bytes 0 to 591) and the material of each active keyslot,
        i.e. everything from which a passphrase yields a volume key. The material of an inactive keyslot
        yields nothing.
    :ivar size: usable size of a qcow2 volume in bytes; ``None`` for a raw volume.
    """

    cipher: Cipher
    digest: bytes
    size: int | None = None

    @classmethod
    def read(cls, read: Read, luks_offset: int, image_format: DiskFormat) -> Self:
        """Read the LUKS header at *luks_offset* of a volume in *image_format*.

        :raise ImageFormatError: When the header is missing, damaged or refused.
        """
        fields = read(luks_offset, HEADER_END)
        digest = hashlib.sha256(fields)
        header = Luks1Header.parse(fields)
        for keyslot in header.keyslots:
            if keyslot.active:
                length = header.volume_key_bytes * keyslot.stripes
                digest.update(read(luks_offset + keyslot.offset, length))
        size = Qcow2Header.parse(read).size if image_format is DiskFormat.QCOW2 else None
        return cls(header.cipher, digest.digest(), size)

    @classmethod
    def of_file(cls, descriptor: int, image_format: DiskFormat) -> Self:
        """The header of the outermost volume of the open image; validates the image's header.

        :raise ImageFormatError: When a header is missing, damaged or refused (:mod:`.image_header`).
        """
        luks_offset, _ = image_header.validate(descriptor, image_format)
        return cls.read(
            lambda offset, length: os.pread(descriptor, length, offset), luks_offset, image_format
        )

    @classmethod
    def of_content(cls, read: Read, size: int, image_format: DiskFormat) -> Self:
        """As :meth:`of_file`, for an image of *size* bytes, e.g. a LUKS volume, read by *read*."""
        luks_offset, _ = image_header.validate_content(read, size, image_format)
        return cls.read(read, luks_offset, image_format)
