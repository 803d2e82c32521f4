"""Records of saved states: which file continues a domain.

The record decides whether a file may be restored: memory older than the last use of the disks contradicts the
disks' file systems. Each start of the domain, and each use of its disks, removes the record.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection
from pathlib import Path
from uuid import UUID

import msgspec

from virt_sse.config import Config
from virt_sse.domains.domain_records import DomainRecords
from virt_sse.domains.pause_locks import pause_locks
from virt_sse.errors import DiskInUseError


class Phase(enum.Enum):
    """What is known of a saved state. All but ``SAVED`` are left behind by killed commands only.

    :cvar SAVING: the domain may be paused; the file may not be complete.
    :cvar ENDING: the file is complete; the domain may still run, paused.
    :cvar SAVED: the domain has ended, the file continues it.
    :cvar RESTORING: libvirt may have the domain again, paused: its guest has not run yet.
    :cvar RESTORED: the guest may run.
    """

    SAVING = "saving"
    ENDING = "ending"
    SAVED = "saved"
    RESTORING = "restoring"
    RESTORED = "restored"


class StateRecord(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The record of a domain's saved state.

    :ivar id: UUID of the saved state.
    :ivar path: the file.
    :ivar is_running: whether the guest runs on once restored.
    :ivar disks: ids of the domain's disks.
    """

    id: str
    path: Path
    phase: Phase
    is_running: bool
    disks: tuple[str, ...]


def state_records(config: Config) -> DomainRecords[StateRecord]:
    """The records of this host's saved states."""
    return DomainRecords(config.saved_states, StateRecord)


def forget_used(config: Config, domain_id: UUID, disk_ids: Collection[UUID]) -> None:
    """Forget the saved states whose domain or disks are about to be used: their memory becomes old.

    The state that a command restores at the moment stays.

    :raise VmStateError: When a record cannot be removed.
    """
    records = state_records(config)
    used = {str(disk_id) for disk_id in disk_ids}
    for saved_domain, record in list(records.all()):
        if saved_domain == domain_id or used & set(record.disks):
            if record.phase is Phase.SAVED:
                records.remove(saved_domain)
            else:
                with contextlib.suppress(DiskInUseError), pause_locks(config).hold(saved_domain):
                    records.remove(saved_domain)
