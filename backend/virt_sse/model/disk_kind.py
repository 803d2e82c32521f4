"""Kinds of encrypted images: disks of domains, and copies kept apart from domains."""

from __future__ import annotations

import enum


class DiskKind(enum.Enum):
    """The purpose of an encrypted image. Domains can use only a ``DISK``."""

    DISK = "disk"
    SNAPSHOT = "snapshot"
    IMAGE = "image"
    RESTORE_POINT = "restore-point"

    @property
    def title(self) -> str:
        """The kind in words, for messages."""
        return self.value.replace("-", " ")
