"""Disk encryption sets: the key that many disks are under, and who may use it for them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType


class RevocationAction(enum.Enum):
    """What becomes of the running domains of a set whose key is taken away.

    ``SHUTDOWN`` asks the guest, and pulls its plug after the grace time.
    """

    SHUTDOWN = "shutdown"
    DESTROY = "destroy"
    PAUSE = "pause"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class EncryptionSet:
    """A disk encryption set.

    :ivar key: the KEK of its disks; for a key vault, the name is the key's URL without version.
    :ivar key_version: the version that its disks are under; ``None`` for the newest.
    :ivar automatic_rotation: whether its disks follow a new version of the key by themselves.
    :ivar tenant: the directory that its identity belongs to.
    :ivar identity: the client id of its system-assigned identity; ``None`` when it has none, because its
        provider needs none, or because it was moved to another tenant.
    :ivar grace_seconds: between the request to shut down and the end, for ``SHUTDOWN``.
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
