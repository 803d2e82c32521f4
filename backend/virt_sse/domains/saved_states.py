"""Encrypted saved states: ``vm save`` and ``vm restore``.

libvirt writes saved states in plaintext. Here a paused guest's memory goes through a FIFO into an encrypted
file. The domain ends only after the file is complete and durable; an error or a kill before leaves the guest
as it was.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

import libvirt
import msgspec

from virt_sse.domains.pause_locks import pause_locks
from virt_sse.domains.state_file import StateDek, StateHeader, StateWriter, read_chunks, read_header
from virt_sse.domains.state_records import Phase, StateRecord, state_records
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    ImageError,
    LibvirtError,
    LibvirtUnavailableError,
    PolicyError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.keys.rewrap import DekProof
from virt_sse.libvirt import domains, memory_image
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.guest_pause import end_pause, paused
from virt_sse.model.disks import PLATFORM_KEY
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek, DekContext, KeyRef
from virt_sse.model.slots import STATE_SLOT
from virt_sse.system.files import canonical, complete_file

_log = logging.getLogger(__name__)

_OLD = "older memory would damage the disks' file systems: remove the file, and start the domain"


@dataclass(frozen=True, slots=True)
class SavedState:
    """A saved state.

    :ivar is_running: whether the guest runs on once restored.
    :ivar keys: the KEK versions that the file needs, all of them.
    """

    domain: str
    path: Path
    is_running: bool
    keys: tuple[str, ...]


class SavedStates:
    """Saves domains with data of ours into encrypted files, and restores domains."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._keys = host.keys
        self._records = state_records(host.config)
        self._folder = host.config.memory_directory
        self._pauses = pause_locks(host.config)

    def save(self, name: str, path: Path) -> SavedState:
        """Save a running or paused domain into the new file *path*, and end the domain.

        After an error the guest runs on, and no file is left.

        :raise VmStateError: When the domain is shut off.
        :raise PolicyError: When the domain has no data of ours: ``virsh save`` serves.
        :raise DiskExistsError: When *path* exists.
        :raise ImageError: When the file cannot be written, e.g. for lack of room.
        :raise KeyProviderError: When a key of the domain's disks does not wrap, e.g. is revoked.
        :raise LibvirtError: When the domain does not exist, or libvirt refuses.
        """
        path = canonical(path)
        with connected(self._uri) as connection:
            domain = domains.lookup(connection, name)
            if not domain.isActive():
                raise VmStateError(f"domain {name!r} is shut off: no state to save")
            definition = domains.definition(domain)
            domain_id = definition.uuid
            with self._pauses.hold(domain_id, wait=True), audit_context(domain=name):
                is_running = bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
                header, deks = self._new(definition, is_running=is_running)
                record = _begun(definition, header, path)
                self._records.put(domain_id, record)
                try:
                    with paused(domain, quiesce=False):
                        with _written(path) as descriptor:
                            writer = StateWriter(descriptor, header, deks)
                            memory_image.receive(domain, self._fifo(domain_id), writer.write)
                            writer.finish()
                        self._end(domain, domain_id, record)
                except BaseException:
                    if domains.is_active(domain):
                        self._records.remove(domain_id)
                    raise
        return _described(header, path)

    def restore(self, path: Path) -> SavedState:
        """Start the domain of a saved state where it was saved, and remove the file.

        After an error the file still continues the domain.

        :raise VmStateError: When the domain runs, or has run since the save.
        :raise ImageError: When the file cannot be read, is no saved state, is damaged or cut off.
        :raise KeyProviderError: When a key of the file does not unwrap, e.g. is revoked.
        :raise LibvirtError: When libvirt refuses the domain, with the hook's reason.
        """
        path = canonical(path)
        with _opened(path) as file:
            header, encoded = read_header(file)
            domain_id = UUID(header.domain)
            with (
                connected(self._uri) as connection,
                self._pauses.hold(domain_id, wait=True),
                audit_context(domain=header.name),
            ):
                record = self._restorable(connection, header, path)
                deks = self._unwrapped(header)
                self._note(domain_id, record, Phase.RESTORING)
                chunks = read_chunks(file, encoded, deks)
                try:
                    memory_image.send(connection, domain_id, self._fifo(domain_id), chunks)
                except BaseException:
                    if domains.runs(connection, domain_id):  # by another command: the file is void
                        self._records.remove(domain_id)
                    else:
                        self._note(domain_id, record, Phase.SAVED)
                    raise
                self._finish_restore(connection, domain_id, record)
        return _described(header, path)

    def of_domain(self, domain_id: UUID) -> Path | None:
        """The file that continues a domain; ``None`` without one, and once the domain has run since."""
        record = self._records.get(domain_id)
        is_saved = record is not None and record.phase is Phase.SAVED and record.path.exists()
        return record.path if record and is_saved else None

    def prove(self, encryption_set: EncryptionSet) -> list[DekProof]:
        """Compare the KEK versions that this host's saved states need with the set's current key."""
        target = self._keys.wrapping_key(encryption_set.key, encryption_set)
        proofs = []
        for _, record in self._records.all():
            header = _header_of(record)
            if header is None:
                continue
            keys = [dek.wrapped.key for dek in header.deks if dek.set == str(encryption_set.id)]
            for key in keys:
                problem = None if key == target else f"needs this key, not {target}, until restored"
                place = f"saved state {record.path}"
                proofs.append(DekProof(f"domain {header.name}", place, key, problem))
        return proofs

    def recover(self) -> None:
        """Finish or undo what killed commands left behind; libvirt's refusals are logged, and tried again."""
        for domain_id, record in self._records.all():
            if record.phase is not Phase.SAVED:
                try:
                    with self._pauses.hold(domain_id), connected(self._uri) as connection:
                        self._settle(connection, domain_id, record)
                except (DiskInUseError, LibvirtUnavailableError):
                    continue
                except LibvirtError as exc:
                    _log.warning("the saved state %s is settled later: %s", record.path, exc)

    def _settle(self, connection: libvirt.virConnect, domain_id: UUID, record: StateRecord) -> None:
        domain = domains.find(connection, domain_id)
        is_active = domain is not None and domains.is_active(domain)
        if record.phase in (Phase.SAVING, Phase.ENDING) and domain is not None and is_active:
            _log.warning("the saved state %s is void: its command was killed", record.path)
            self._void(domain_id, record)
            if record.is_running:
                end_pause(domain)
        elif record.phase is Phase.SAVING:
            self._void(domain_id, record)
        elif record.phase is Phase.RESTORED or is_active:
            self._finish_restore(connection, domain_id, record)
        elif record.phase is Phase.ENDING and _ended_by_itself(connection, domain_id):
            _log.warning("the saved state %s is void: the guest ran on and ended", record.path)
            self._records.remove(domain_id)
        else:
            self._note(domain_id, record, Phase.SAVED)

    def _new(self, definition: DomainDefinition, *, is_running: bool) -> tuple[StateHeader, list[Dek]]:
        """A header with new wrapped DEKs, one for each encryption set of the domain's disks.

        The file's key depends on all of them: each of the sets' keys can be revoked on its own.
        """
        ids = {use.disk_id for use in definition.our_disks}
        owners: dict[UUID | None, KeyRef] = {disk.set_id: disk.key for disk in self._host.store.with_ids(ids)}
        if not owners:
            if not definition.mentions_us:
                raise PolicyError(
                    f"domain {definition.name!r} has no disks or settings of virt-sse",
                    hint=f"'virsh save {definition.name} FILE' saves the domain, in plaintext",
                )
            owners = {None: PLATFORM_KEY}
        state_id = uuid.uuid4()
        deks, wrapped = [], []
        for set_id, key in owners.items():
            encryption_set = self._host.store.encryption_sets.get(str(set_id)) if set_id else None
            version = self._keys.wrapping_key(key, encryption_set)
            dek = Dek.generate()
            of_set = self._keys.wrap(dek, version, context=DekContext(state_id, STATE_SLOT), set_id=set_id)
            deks.append(dek)
            wrapped.append(StateDek.of(of_set, str(set_id) if set_id else None))
        header = StateHeader(
            id=str(state_id),
            domain=str(definition.uuid),
            name=definition.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            is_running=is_running,
            deks=tuple(wrapped),
        )
        return header, deks

    def _unwrapped(self, header: StateHeader) -> list[Dek]:
        context = DekContext(UUID(header.id), STATE_SLOT)
        return [
            self._keys.unwrap(each.wrapped, context=context, set_id=UUID(each.set) if each.set else None)
            for each in header.deks
        ]

    def _end(self, domain: libvirt.virDomain, domain_id: UUID, record: StateRecord) -> None:
        """End a domain whose state is in the record's file; after an error the file is removed."""
        record = msgspec.structs.replace(record, phase=Phase.ENDING)
        try:
            self._records.put(domain_id, record)
            domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)
        except BaseException:
            if domains.is_active(domain):
                self._void(domain_id, record)
            raise
        self._note(domain_id, record, Phase.SAVED)

    def _void(self, domain_id: UUID, record: StateRecord) -> None:
        """Forget a state, and remove the file: before the guest runs on."""
        if _header_of(record):
            record.path.unlink(missing_ok=True)
        self._records.remove(domain_id)

    def _restorable(self, connection: libvirt.virConnect, header: StateHeader, path: Path) -> StateRecord:
        domain_id = UUID(header.domain)
        if domains.runs(connection, domain_id):
            raise VmStateError(f"domain {header.name!r} is running", hint="shut the domain down first")
        record = self._records.get(domain_id)
        if record is None or record.id != header.id or record.phase is not Phase.SAVED:
            raise VmStateError(
                f"{path} is not the last saved state of domain {header.name!r} on this host",
                hint=_OLD,
            )
        for disk in self._host.store.with_ids({UUID(each) for each in record.disks}):
            if self._host.freshness.is_ahead(disk):
                raise VmStateError(
                    f"disk {disk.name!r} was used on another host after the state in {path} was saved",
                    hint=_OLD,
                )
        return msgspec.structs.replace(record, path=path)  # the file may have been moved

    def _finish_restore(self, connection: libvirt.virConnect, domain_id: UUID, record: StateRecord) -> None:
        """Let the guest of a restored domain run on, and remove file and record."""
        self._note(domain_id, record, Phase.RESTORED)
        domain = domains.find(connection, domain_id)
        if domain is not None and record.is_running and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
        record.path.unlink(missing_ok=True)
        self._records.remove(domain_id)

    def _note(self, domain_id: UUID, record: StateRecord, phase: Phase) -> None:
        self._records.put(domain_id, msgspec.structs.replace(record, phase=phase))

    def _fifo(self, domain_id: UUID) -> Path:
        return self._folder / str(domain_id)


def _begun(definition: DomainDefinition, header: StateHeader, path: Path) -> StateRecord:
    return StateRecord(
        id=header.id,
        path=path,
        phase=Phase.SAVING,
        is_running=header.is_running,
        disks=tuple(sorted({str(use.disk_id) for use in definition.our_disks})),
    )


def _header_of(record: StateRecord) -> StateHeader | None:
    """The header of the record's file; ``None`` if the file is gone, or another file has the name."""
    try:
        with record.path.open("rb") as file:
            header, _ = read_header(file)
    except (OSError, ImageError):
        return None
    return header if header.id == record.id else None


def _ended_by_itself(connection: libvirt.virConnect, domain_id: UUID) -> bool:
    """Whether a domain is known to have ended by another cause than ``vm save``."""
    domain = domains.find(connection, domain_id)
    causes = (libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN)
    return domain is not None and domain.state()[1] not in causes


def _described(header: StateHeader, path: Path) -> SavedState:
    keys = tuple(str(each.wrapped.key) for each in header.deks)
    return SavedState(header.name, path, header.is_running, keys)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[int]:
    """Open a new file that gets its name when the block succeeds."""
    if path.exists():
        raise DiskExistsError(f"{path} exists")
    try:
        with complete_file(path) as descriptor:
            yield descriptor
    except FileExistsError as exc:
        raise DiskExistsError(f"{path} exists") from exc
    except OSError as exc:
        raise ImageError(f"cannot write {path}: {exc.strerror}") from exc


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
