"""The format of a disk's image."""

from __future__ import annotations

import enum


class DiskFormat(enum.Enum):
    """How a disk lies in its file."""

    QCOW2 = "qcow2"
    RAW = "raw"

    @property
    def qemu_driver(self) -> str:
        """QEMU's block driver for the encrypted image."""
        return "luks" if self is DiskFormat.RAW else "qcow2"

    @property
    def qemu_key_secret(self) -> str:
        """That driver's option which names the secret object with the passphrase."""
        return "key-secret" if self is DiskFormat.RAW else "encrypt.key-secret"

    @property
    def luks_option_prefix(self) -> str:
        """What that driver puts before the options of LUKS when it makes an image."""
        return "" if self is DiskFormat.RAW else "encrypt."
