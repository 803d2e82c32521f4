"""Copies of disks in the store (:mod:`virt_sse.model.replacements`)."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from virt_sse.errors import DiskStateError
from virt_sse.model.disks import DiskState
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.store.engine import reading, writing
from virt_sse.store.tables import copies, disks
from virt_sse.system.postgresql import serialise


class ReplacementStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def all(self) -> list[Replacement]:
        """All copies, also done copies with a plaintext image that is still there."""
        return self._select(sa.true())

    def find(self, disk_id: UUID) -> Replacement | None:
        """The unfinished copy with this disk as source or as new disk, if any."""
        is_disk = sa.or_(copies.c.disk_id == disk_id, copies.c.source_id == disk_id)
        return next(iter(self._select(sa.and_(is_disk, copies.c.state != ReplacementState.KEPT.value))), None)

    def of_domain(self, domain_id: UUID) -> list[Replacement]:
        """The copies of disks of a domain."""
        return self._select(copies.c.domain_id == domain_id)

    def begin(self, copy: Replacement) -> None:
        """Record a copy. The source disk, if any, becomes ``copying``.

        :raise DiskStateError: When the source disk is not ready, or the plaintext image has a copy already.
        """
        with writing(self._engine) as connection:
            if copy.source_id and not _change_state(
                connection, copy.source_id, DiskState.READY, DiskState.COPYING
            ):
                raise DiskStateError(f"disk {copy.name!r} is not ready")
            path = str(copy.source_path) if copy.source_path else None
            if path:
                serialise(connection, "copy", path)
                query = sa.select(copies.c.disk_id).where(
                    copies.c.source_path == path, copies.c.state != ReplacementState.KEPT.value
                )
                if connection.scalar(query):
                    raise DiskStateError(f"{path} is being copied already")
            connection.execute(
                copies.insert().values(
                    disk_id=copy.disk_id,
                    name=copy.name,
                    source_id=copy.source_id,
                    source_path=path,
                    source_device=copy.source_identity[0] if copy.source_identity else None,
                    source_inode=copy.source_identity[1] if copy.source_identity else None,
                    final_path=str(copy.final_path) if copy.final_path else None,
                    domain_id=copy.domain_id,
                    target=copy.target,
                    state=copy.state.value,
                    is_detached=copy.is_detached,
                    is_cancelled=copy.is_cancelled,
                    max_rate=copy.max_rate,
                )
            )

    def set_state(self, copy: Replacement, state: ReplacementState) -> None:
        """Set the state of a copy."""
        self._update(copy.disk_id, state=state.value)

    def cancel(self, copy: Replacement) -> None:
        """Request that a copy be undone."""
        self._update(copy.disk_id, is_cancelled=True)

    def reserve(self, copy: Replacement) -> None:
        """Reserve the new disk of a copy: from ``ready``, as created, to ``copying``."""
        with writing(self._engine) as connection:
            _change_state(connection, copy.disk_id, DiskState.READY, DiskState.COPYING)

    def take_over(self, copy: Replacement) -> None:
        """Put the new disk in place of the source, which becomes ``deleting``: the point of no return."""
        with writing(self._engine) as connection:
            if copy.source_id:
                connection.execute(
                    disks.update()
                    .where(disks.c.id == copy.source_id)
                    .values(name=str(copy.source_id), state=DiskState.DELETING.value)
                )
            connection.execute(
                disks.update()
                .where(disks.c.id == copy.disk_id)
                .values(name=copy.name, state=DiskState.READY.value)
            )
            connection.execute(
                copies.update()
                .where(copies.c.disk_id == copy.disk_id)
                .values(state=ReplacementState.DONE.value)
            )

    def abandon(self, copy: Replacement) -> None:
        """Undo a copy: the source disk becomes ``ready``, the new disk, if created, ``deleting``."""
        with writing(self._engine) as connection:
            if copy.source_id:
                _change_state(connection, copy.source_id, DiskState.COPYING, DiskState.READY)
            connection.execute(
                disks.update().where(disks.c.id == copy.disk_id).values(state=DiskState.DELETING.value)
            )
            connection.execute(copies.delete().where(copies.c.disk_id == copy.disk_id))

    def remove(self, copy: Replacement) -> None:
        """Forget a finished copy."""
        with writing(self._engine) as connection:
            connection.execute(copies.delete().where(copies.c.disk_id == copy.disk_id))

    def _update(self, disk_id: UUID, **values: object) -> None:
        with writing(self._engine) as connection:
            connection.execute(copies.update().where(copies.c.disk_id == disk_id).values(**values))

    def _select(self, condition: sa.ColumnElement[bool]) -> list[Replacement]:
        with reading(self._engine) as connection:
            found = map(_copy, connection.execute(sa.select(copies).where(condition)))
            return sorted(found, key=attrgetter("name"))


def _change_state(connection: Connection, disk_id: UUID, before: DiskState, after: DiskState) -> bool:
    changed = connection.execute(
        disks.update().where(disks.c.id == disk_id, disks.c.state == before.value).values(state=after.value)
    )
    return changed.rowcount == 1


def _copy(row: Any) -> Replacement:
    return Replacement(
        disk_id=row.disk_id,
        name=row.name,
        source_id=row.source_id,
        source_path=Path(row.source_path) if row.source_path else None,
        source_identity=(row.source_device, row.source_inode) if row.source_inode is not None else None,
        final_path=Path(row.final_path) if row.final_path else None,
        domain_id=row.domain_id,
        target=row.target,
        state=ReplacementState(row.state),
        is_detached=row.is_detached,
        is_cancelled=row.is_cancelled,
        max_rate=row.max_rate,
    )
