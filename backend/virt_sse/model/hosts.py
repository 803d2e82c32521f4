"""Hosts that share a store, and their leases on disks and VMs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from uuid import UUID

SILENT_SECONDS = 60
"""A host that the database has not seen for this time counts as silent, and may be fenced."""


class HostState(enum.Enum):
    """State of a host, as seen by the others."""

    ALIVE = "alive"
    SILENT = "silent"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Identity of this host.

    :ivar id: made at the first use of a shared store, and kept in the host's state folder.
    :ivar boot_id: the kernel's id of the present boot (random(4)); a new one proves that all processes ended.
    """

    id: UUID
    name: str
    boot_id: UUID


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A host in the store.

    :ivar silent_seconds: time since the host was last seen.
    :ivar leases: number of disks and VMs that the host alone may use.
    """

    id: UUID
    name: str
    silent_seconds: int
    is_fenced: bool
    leases: int

    @property
    def state(self) -> HostState:
        """The state of the host now."""
        if self.is_fenced:
            return HostState.FENCED
        return HostState.SILENT if self.silent_seconds >= SILENT_SECONDS else HostState.ALIVE


@dataclass(frozen=True, slots=True)
class LeaseUse:
    """A use of a lease of this host.

    :ivar resource_id: the disk or VM.
    :ivar user_id: the domain, or the host's id for the work of commands.
    :ivar seconds: since the use began.
    :ivar is_awaited: whether another host has the lease, until the domain has migrated to this host.
    """

    resource_id: UUID
    user_id: UUID
    seconds: int
    is_awaited: bool = False
