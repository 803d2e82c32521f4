"""What a guest has encrypted on a disk by itself."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from virt_sse.errors import PolicyError, VirtSseError


class EncryptionKind(enum.Enum):
    """What a guest has encrypted a volume with."""

    LUKS1 = "LUKS1"
    LUKS2 = "LUKS2"
    BITLOCKER = "BitLocker"
    BITLOCKER_TO_GO = "BitLocker To Go"
    FILEVAULT = "FileVault 2"
    EXT4_ENCRYPT = "ext4 encrypt"
    """Files and folders of an ext4 file system, not all of it: the feature that they need is switched on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A volume on a disk that the guest has encrypted.

    :ivar partition: ``disk`` for all of it; ``gpt-2``; for a volume in a partition ``gpt-2/lvm``.
    :ivar offset: in bytes, from the disk's beginning.
    :ivar size: in bytes; for a volume in a partition up to that one's end.
    """

    partition: str
    offset: int
    size: int
    kind: EncryptionKind


class Content:
    """What a disk holds, or is to hold: looked at once, and only if a policy asks, because it takes a key."""

    def __init__(self, look: Callable[[], Sequence[Finding]]) -> None:
        self._look = look
        self._findings: tuple[Finding, ...] | None = None

    def in_guest_encryption(self) -> tuple[Finding, ...]:
        """What of it the guest has encrypted.

        :raise PolicyError: When that cannot be seen.
        """
        if self._findings is None:
            try:
                self._findings = tuple(self._look())
            except PolicyError:
                raise
            except VirtSseError as exc:
                raise PolicyError(f"cannot see whether it has in-guest encryption: {exc}") from exc
        return self._findings


def described(findings: Sequence[Finding]) -> str:
    """In words: the kinds and where, e.g. ``LUKS2 (gpt-2)``."""
    return ", ".join(dict.fromkeys(f"{finding.kind.value} ({finding.partition})" for finding in findings))
