"""Records of saved states: which file continues a domain.

The record decides whether a file may be restored: memory older than the last use of the disks contradicts the
disks' file systems. Each start of the domain, and each use of its disks, removes the record.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Collection, Iterator
from pathlib import Path
from uuid import UUID

import msgspec

from virt_sse.config import Config
from virt_sse.domains.pause_locks import pause_locks
from virt_sse.errors import DiskInUseError, VmStateError
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import private_folder, sync_folder, write_private

_SUFFIX = ".json"


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


def forget_used(config: Config, domain_id: UUID, disk_ids: Collection[UUID]) -> None:
    """Forget the saved states whose domain or disks are about to be used: their memory becomes old.

    The state that a command restores at the moment stays.

    :raise VmStateError: When a record cannot be removed.
    """
    records = StateRecords(config.saved_states)
    used = {str(disk_id) for disk_id in disk_ids}
    for saved_domain, record in list(records.all()):
        if saved_domain == domain_id or used & set(record.disks):
            if record.phase is Phase.SAVED:
                records.remove(saved_domain)
            else:
                with contextlib.suppress(DiskInUseError), pause_locks(config).hold(saved_domain):
                    records.remove(saved_domain)


class StateRecords:
    """The records of this host's domains; a file per domain, named by its UUID."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> Iterator[tuple[UUID, StateRecord]]:
        """The records by the UUIDs of their domains; unreadable records are left out."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                domain_id = UUID(path.stem)
                found = self.get(domain_id)
            except (ValueError, VmStateError):
                continue
            if found:
                yield domain_id, found

    def get(self, domain_id: UUID) -> StateRecord | None:
        """The record of a domain's saved state, if any.

        :raise VmStateError: When the record cannot be read.
        """
        path = self._path(domain_id)
        try:
            return from_json(path.read_bytes(), StateRecord)
        except FileNotFoundError:
            return None
        except (OSError, DocumentError) as exc:
            raise VmStateError(f"cannot read {path}: {exc}") from exc

    def put(self, domain_id: UUID, record: StateRecord) -> None:
        """Replace the record of a domain, durably.

        :raise VmStateError: When the record cannot be written.
        """
        path = self._path(domain_id)
        try:
            private_folder(self._folder)
            write_private(path, msgspec.json.encode(record, enc_hook=str))
        except OSError as exc:
            raise VmStateError(f"cannot write {path}: {exc.strerror}") from exc

    def remove(self, domain_id: UUID) -> None:
        """Remove the record of a domain, if any, durably.

        :raise VmStateError: When the record cannot be removed.
        """
        path = self._path(domain_id)
        try:
            path.unlink()
            sync_folder(self._folder)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise VmStateError(f"cannot remove {path}: {exc.strerror}") from exc

    def _path(self, domain_id: UUID) -> Path:
        return self._folder / f"{domain_id}{_SUFFIX}"
