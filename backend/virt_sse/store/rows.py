"""Rows of the store as objects of the model, for SQLAlchemy and for :mod:`virt_sse.store.reader`.

A row has an attribute per column, of the type in :mod:`virt_sse.store.tables`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from virt_sse.errors import StoreError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskSku, DiskState
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType, HostCaching, Placement
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties
from virt_sse.system.documents import DocumentError, from_json

UNFINISHED_STATES = tuple(state.value for state in DiskState if not state.is_at_rest)
"""For an ``IN``, which uses the index; "not at rest" would read all disks."""

_log = logging.getLogger(__name__)


def disks_of(rows: Iterable[Any]) -> list[Disk]:
    """The disks in rows of ``disks`` joined with ``wrapped_deks``, sorted by name.

    Sorted here: the order of PostgreSQL depends on the collation of the database.

    :param rows: the rows of a disk in the order of the DEKs; each row also has the ``placement`` of the
        disk's encryption set.
    """
    of_disk: dict[UUID, list[Any]] = {}
    for row in rows:
        of_disk.setdefault(row.id, []).append(row)
    return sorted(map(_disk, of_disk.values()), key=attrgetter("name"))


def _disk(rows: Sequence[Any]) -> Disk:
    """A disk from its rows, one per DEK; during a deletion the DEKs may be gone."""
    first = rows[0]
    return Disk(
        id=first.id,
        name=first.name,
        path=Path(first.path),
        format=DiskFormat(first.format),
        size=first.size,
        state=DiskState(first.state),
        encryption_type=EncryptionType(first.encryption_type),
        created=datetime.fromisoformat(first.created),
        generation=first.generation,
        sku=DiskSku(first.sku),
        set_id=first.encryption_set_id,
        caching=HostCaching(first.caching),
        kind=DiskKind(first.kind),
        source_id=first.source_id,
        point=first.point,
        origin_id=first.origin_id,
        placement=_placement(first),
        serial=first.serial,
        base_id=first.base_id,
        deleted=_moment(first.deleted),
        scheduled_purge=_moment(first.scheduled_purge),
        deks=tuple(
            DekEntry(
                row.slot,
                Cipher.parse(row.cipher),
                WrappedDek(
                    row.ciphertext, row.algorithm, KeyId(row.key_provider, row.key_name, row.key_version)
                ),
            )
            for row in rows
            if row.slot is not None
        ),
    )


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _placement(row: Any) -> Placement | None:
    """The placement of a disk; a guest's QEMU gets no key of the image below a linked clone."""
    if row.base_id and row.kind == DiskKind.DISK.value:
        return Placement.STORAGE
    return Placement(row.placement) if row.placement else None


class _Pending(msgspec.Struct, frozen=True, rename="kebab"):
    """A :class:`PendingUpdate` in JSON."""

    encryption_at_host: bool
    size: str | None
    temp_disk_size: int | None
    caching: dict[UUID, HostCaching]


def pending_to_json(pending: PendingUpdate) -> str:
    """The text of a pending update in the store."""
    properties = pending.properties
    document = _Pending(
        properties.encryption_at_host, properties.size, properties.temp_disk_size, dict(pending.caching)
    )
    return msgspec.json.encode(document).decode()


def vm_of(row: Any, *, tolerant: bool) -> Vm:
    """The VM in a row.

    :param tolerant: log and leave out a damaged pending update, instead of raising.
    :raise StoreError: When the pending update is damaged.
    """
    tpm = None
    if row.tpm_ciphertext is not None:
        key = KeyId(row.tpm_key_provider, row.tpm_key_name, row.tpm_key_version)
        tpm = WrappedDek(row.tpm_ciphertext, row.tpm_algorithm, key)
    return Vm(
        id=row.id,
        name=row.name,
        host=row.host,
        properties=VmProperties(row.encryption_at_host, row.size, row.temp_disk_size),
        generation=row.generation,
        pending=_pending(row, tolerant=tolerant),
        tpm=tpm,
    )


def _pending(row: Any, *, tolerant: bool) -> PendingUpdate | None:
    try:
        return _from_json(row.pending) if row.pending else None
    except StoreError as exc:
        if not tolerant:
            raise
        _log.warning("domain %s: %s", row.name, exc)
        return None


def _from_json(text: str) -> PendingUpdate:
    try:
        document = from_json(text.encode(), _Pending)
    except DocumentError as exc:
        raise StoreError(f"the store has an invalid pending update of a VM: {exc}") from exc
    properties = VmProperties(document.encryption_at_host, document.size, document.temp_disk_size)
    return PendingUpdate(properties, document.caching)
