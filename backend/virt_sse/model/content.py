"""In-guest encryption found on a disk."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from virt_sse.errors import PolicyError, VirtSseError


class EncryptionKind(enum.Enum):
    """The scheme with which a guest encrypted a volume."""

    LUKS1 = "LUKS1"
    LUKS2 = "LUKS2"
    BITLOCKER = "BitLocker"
    BITLOCKER_TO_GO = "BitLocker To Go"
    FILEVAULT = "FileVault 2"
    EXT4_ENCRYPT = "ext4 encrypt"
    """The ext4 feature for encrypted files and folders is enabled; other files may be plaintext."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A volume on a disk, encrypted by the guest.

    :ivar partition: ``disk`` for the whole disk; else e.g. ``gpt-2``, or ``gpt-2/lvm`` for a volume in a
        partition.
    :ivar offset: in bytes, from the beginning of the disk.
    :ivar size: in bytes; a volume in a partition counts up to the end of the partition.
    """

    partition: str
    offset: int
    size: int
    kind: EncryptionKind


class Content:
    """The present or future content of a disk, inspected lazily and once, because inspection uses a key.

    :param inspect: reads the disk and returns the encrypted volumes on it.
    """

    def __init__(self, inspect: Callable[[], Sequence[Finding]]) -> None:
        self._inspect = inspect
        self._findings: tuple[Finding, ...] | None = None

    def in_guest_encryption(self) -> tuple[Finding, ...]:
        """The volumes on the disk that the guest encrypted.

        :raise PolicyError: When the content cannot be inspected.
        """
        if self._findings is None:
            try:
                self._findings = tuple(self._inspect())
            except PolicyError:
                raise
            except VirtSseError as exc:
                raise PolicyError(f"cannot inspect the disk for in-guest encryption: {exc}") from exc
        return self._findings


def described(findings: Sequence[Finding]) -> str:
    """*findings* as text: kind and partition of each, e.g. ``LUKS2 (gpt-2)``."""
    return ", ".join(dict.fromkeys(f"{finding.kind.value} ({finding.partition})" for finding in findings))
