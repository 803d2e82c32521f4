"""Reads an SQLite store with the standard library alone.

SQLAlchemy takes longer to import than libvirt should wait for its hook. The tables are not described here
again: a statement selects all columns, the types declared in the database convert the values, and
:mod:`virt_sse.store.rows` makes the objects.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, Self
from urllib.parse import quote
from uuid import UUID

from virt_sse.errors import DiskNotFoundError, StoreError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.vms import Vm
from virt_sse.store.rows import UNFINISHED_STATES, disks_of, vm_of
from virt_sse.store.schema import BUSY_TIMEOUT_SECONDS, SCHEMA

_URL = "sqlite:///"

sqlite3.register_converter("CHAR", lambda value: UUID(value.decode()))  # of sqlalchemy.Uuid
sqlite3.register_converter("BOOLEAN", lambda value: value == b"1")


class VmReads(Protocol):
    """Queries for VMs."""

    def find(self, vm_id: UUID) -> Vm | None:
        """As :meth:`VmStore.find`."""


class StoreReads(Protocol):
    """Queries needed at the start of a domain and for listings. The store answers them, and a reader."""

    @property
    def vms(self) -> VmReads:
        """The VMs."""

    def get(self, name: str) -> Disk:
        """As :meth:`Store.get`."""

    def with_ids(self, ids: Collection[UUID]) -> list[Disk]:
        """As :meth:`Store.with_ids`."""

    def at_paths(self, paths: Collection[Path]) -> list[Disk]:
        """As :meth:`Store.at_paths`."""

    def all(self, kind: DiskKind | None = None) -> list[Disk]:
        """As :meth:`Store.all`."""

    def names(self, kind: DiskKind | None = None, *, is_deleted: bool | None = None) -> list[str]:
        """As :meth:`Store.names`."""

    def unfinished(self) -> list[Disk]:
        """As :meth:`Store.unfinished`."""

    def encryption_set_names(self) -> list[str]:
        """As :meth:`Store.encryption_set_names`."""


class StoreReader:
    """A store in SQLite, opened for each query. The queries are those of the store, with the same results.

    Every method raises StoreError when the database fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def of(cls, url: str) -> Self | None:
        """A reader of the store at *url*; ``None`` unless in SQLite, with the current schema."""
        path = url.removeprefix(_URL)
        if path == url or not path.startswith("/") or "?" in path:
            return None
        reader = cls(Path(path))
        try:
            revisions = reader._select("SELECT version_num FROM alembic_version")
        except StoreError:
            return None  # the full store creates a missing database, or reports the error
        return reader if [row.version_num for row in revisions] == [SCHEMA] else None

    @property
    def vms(self) -> _VmReader:
        """The VMs in the store."""
        return _VmReader(self)

    def get(self, name: str) -> Disk:
        """The disk with the given name or id.

        :raise DiskNotFoundError: When no disk has this name or id.
        """
        disk_id = ""
        with contextlib.suppress(ValueError):
            disk_id = UUID(name).hex
        found: list[Disk] = []
        with contextlib.suppress(UnicodeEncodeError):  # not UTF-8, therefore no disk name
            found = self._disks("disks.name = ? OR disks.id = ?", name, disk_id)
        if not found:
            raise DiskNotFoundError(f"no disk {name[:80]!r}", hint="'virt-sse disk list' shows all disks")
        return next((disk for disk in found if disk.name == name), found[0])

    def with_ids(self, ids: Collection[UUID]) -> list[Disk]:
        """The existing disks among *ids*, sorted by name."""
        marks = ", ".join("?" * len(ids))
        return self._disks(f"disks.id IN ({marks})", *(each.hex for each in ids)) if ids else []

    def at_paths(self, paths: Collection[Path]) -> list[Disk]:
        """The disks with their images at *paths*, sorted by name."""
        places = ", ".join("?" * len(paths))
        return self._disks(f"disks.path IN ({places})", *map(str, paths)) if paths else []

    def all(self, kind: DiskKind | None = None) -> list[Disk]:
        """All disks, sorted by name, or those of one kind."""
        return self._disks("disks.kind = ?", kind.value) if kind else self._disks("TRUE")

    def names(self, kind: DiskKind | None = None, *, is_deleted: bool | None = None) -> list[str]:
        """The names of the disks that :meth:`all` has; deleted or other ones only, if asked for."""
        conditions, values = ["TRUE"], []
        if kind:
            conditions, values = ["kind = ?"], [kind.value]
        if is_deleted is not None:
            conditions.append("state = ?" if is_deleted else "state != ?")
            values.append(DiskState.DELETED.value)
        query = "SELECT name FROM disks WHERE "
        rows = self._select(query + " AND ".join(conditions), *values)
        return sorted(row.name for row in rows)

    def unfinished(self) -> list[Disk]:
        """The disks whose creation or deletion is in progress or was interrupted."""
        marks = ", ".join("?" * len(UNFINISHED_STATES))
        return self._disks(f"disks.state IN ({marks})", *UNFINISHED_STATES)

    def encryption_set_names(self) -> list[str]:
        """The names of all disk encryption sets, sorted."""
        return [row.name for row in self._select("SELECT name FROM encryption_sets ORDER BY name")]

    def _disks(self, condition: str, *values: str) -> list[Disk]:
        # A single statement, so that a disk and its DEKs are consistent.
        placement = "(SELECT placement FROM encryption_sets WHERE id = disks.encryption_set_id) AS placement"
        joined = "disks LEFT JOIN wrapped_deks ON wrapped_deks.disk_id = disks.id"
        order = "ORDER BY wrapped_deks.position"
        query = f"SELECT *, {placement} FROM {joined} WHERE {condition} {order}"  # noqa: S608 -- constants
        return disks_of(self._select(query, *values))

    def _select(self, statement: str, *values: str) -> list[SimpleNamespace]:
        try:
            with self._opened() as connection:
                cursor = connection.execute(statement, values)
                columns = [name for name, *_ in cursor.description]
                return [SimpleNamespace(**dict(zip(columns, row, strict=True))) for row in cursor]
        except sqlite3.Error as exc:
            raise StoreError(f"the store failed: {exc}") from None

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Open the existing database. Mode ``ro`` would leave files of the write-ahead log behind."""
        with contextlib.closing(
            sqlite3.connect(
                f"file:{quote(str(self._path))}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT_SECONDS,
                detect_types=sqlite3.PARSE_DECLTYPES,
                isolation_level=None,
            )
        ) as connection:
            connection.execute("PRAGMA query_only = ON")
            yield connection


class _VmReader:
    """The VMs of a store in SQLite."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader

    def find(self, vm_id: UUID) -> Vm | None:
        """The VM with the given domain UUID, if known."""
        rows = self._reader._select("SELECT * FROM vms WHERE id = ?", vm_id.hex)
        return vm_of(rows[0], tolerant=False) if rows else None
