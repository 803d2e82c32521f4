"""Disk encryption sets: a key for many disks, and the identity that uses the key."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType, Placement


class RevocationAction(enum.Enum):
    """Enforcement action for the running domains of a set whose key is revoked.

    ``SHUTDOWN`` asks the guest to shut down and destroys the domain after the grace time.
    """

    SHUTDOWN = "shutdown"
    DESTROY = "destroy"
    PAUSE = "pause"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class EncryptionSet:
    """A disk encryption set.

    :ivar key: the KEK of the set's disks; for a key vault, the key's URL without version is the name.
    :ivar key_version: the version of the KEK in use; ``None`` for the newest.
    :ivar automatic_rotation: whether the agent rewraps the set's disks when the key gets a new version.
    :ivar tenant: the directory of the set's identity.
    :ivar identity: client id of the set's system-assigned identity; ``None`` if the key provider needs no
        identity, or after the set moved to a different tenant.
    :ivar grace_seconds: time between the shutdown request and the end of the domain, for ``SHUTDOWN``.
    :ivar placement: placement of the set's disks; ``None`` for the host's configured placement.
    """

    id: UUID
    name: str
    key: KeyRef
    key_version: str | None
    encryption_type: EncryptionType
    automatic_rotation: bool
    subscription: str
    region: str
    tenant: str | None
    identity: str | None
    revocation: RevocationAction
    grace_seconds: int
    created: datetime
    placement: Placement | None = None
