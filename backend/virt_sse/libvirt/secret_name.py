"""Names in domain XML by which the libvirt hook recognizes our disks, without the store and the agent.

- ``<secret type='passphrase' usage='virt-sse:DISK-ID:SLOT'/>``: the libvirt secret with a DEK.
- ``<source protocol='nbd' name='virt-sse:DISK-ID'>``: the NBD export of a disk that is decrypted below the
  guest's QEMU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self
from uuid import UUID, uuid5

PREFIX = "virt-sse:"
_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True)
class SecretName:
    """Name of the libvirt secret with a DEK.

    :ivar owner: id of the disk; for the slot ``tpm``, UUID of the domain.
    :ivar slot: the DEK's slot.
    """

    owner: UUID
    slot: str

    @classmethod
    def parse(cls, usage: str) -> Self | None:
        """Read a secret's usage id; ``None`` for a secret without our prefix.

        :raise ValueError: When the usage id has our prefix and is malformed.
        """
        if not usage.startswith(PREFIX):
            return None
        owner, _, slot = usage.removeprefix(PREFIX).partition(":")
        if not slot.isprintable():
            raise ValueError(f"invalid slot in {usage[:_LONGEST_SHOWN]!r}")
        if not slot:
            raise ValueError(f"no slot in {usage[:_LONGEST_SHOWN]!r}")
        return cls(UUID(owner), slot)

    @property
    def usage(self) -> str:
        """The secret's usage id."""
        return f"{PREFIX}{self.owner}:{self.slot}"

    @property
    def uuid(self) -> UUID:
        """The secret's UUID, derived from the name: defining the secret again replaces the secret."""
        return uuid5(self.owner, self.slot)


def plain_export(disk_id: UUID) -> str:
    """Name of the NBD export of a disk that is decrypted below the guest's QEMU."""
    return f"{PREFIX}{disk_id}"


def exported_disk(name: str) -> UUID | None:
    """The disk whose plaintext the NBD export *name* has; ``None`` for an export that is not ours.

    :raise ValueError: When the name has our prefix and is malformed.
    """
    return UUID(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
