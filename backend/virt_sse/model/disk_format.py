"""The format of a disk's image."""

from __future__ import annotations

import enum


class DiskFormat(enum.Enum):
    """The image format around a disk's LUKS volume."""

    QCOW2 = "qcow2"
    RAW = "raw"

    @property
    def qemu_driver(self) -> str:
        """QEMU's block driver for the encrypted image."""
        return "luks" if self is DiskFormat.RAW else "qcow2"

    @property
    def qemu_key_secret(self) -> str:
        """The option of :attr:`qemu_driver` for the id of the secret object with the passphrase."""
        return "key-secret" if self is DiskFormat.RAW else "encrypt.key-secret"

    @property
    def luks_option_prefix(self) -> str:
        """The prefix of LUKS options when :attr:`qemu_driver` creates an image."""
        return "" if self is DiskFormat.RAW else "encrypt."
