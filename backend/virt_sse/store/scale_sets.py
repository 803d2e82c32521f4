"""Scale sets in the store."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from operator import attrgetter
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from virt_sse.errors import ScaleSetExistsError, ScaleSetNotFoundError
from virt_sse.model.scale_sets import Instance, ScaleSet
from virt_sse.store.engine import reading, writing
from virt_sse.store.statements import is_storable, refusing
from virt_sse.store.tables import scale_set_instances, scale_sets


class ScaleSetStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, scale_set: ScaleSet) -> None:
        """Add a set without instances.

        :raise ScaleSetExistsError: When the name is taken.
        """
        exists = ScaleSetExistsError(f"scale set {scale_set.name!r} exists already")
        with writing(self._engine) as connection, refusing(exists):
            connection.execute(
                scale_sets.insert().values(
                    id=scale_set.id,
                    name=scale_set.name,
                    definition=scale_set.definition,
                    image_id=scale_set.image_id,
                    size=scale_set.size,
                    encryption_at_host=scale_set.encryption_at_host,
                    created=scale_set.created.isoformat(),
                    is_deleting=scale_set.is_deleting,
                )
            )

    def all(self) -> list[ScaleSet]:
        """All sets, by name."""
        return self._select(sa.true())

    def get(self, name: str) -> ScaleSet:
        """The set of that name.

        :raise ScaleSetNotFoundError: When no set has the name.
        """
        found = self._select(scale_sets.c.name == name) if is_storable(name) else []
        if not found:
            raise ScaleSetNotFoundError(
                f"no scale set {name[:80]!r}", hint="'virt-sse vmss list' shows all scale sets"
            )
        return found[0]

    def update(
        self,
        set_id: UUID,
        *,
        size: int | None = None,
        encryption_at_host: bool | None = None,
        is_deleting: bool | None = None,
    ) -> None:
        """Change what is wanted; ``None`` keeps a value."""
        changes = {"size": size, "encryption_at_host": encryption_at_host, "is_deleting": is_deleting}
        values = {name: value for name, value in changes.items() if value is not None}
        with writing(self._engine) as connection:
            connection.execute(scale_sets.update().where(scale_sets.c.id == set_id).values(**values))

    def plan(self, set_id: UUID, instances: Collection[Instance]) -> None:
        """Add instances that are to be made."""
        with writing(self._engine) as connection:
            for each in instances:
                connection.execute(
                    scale_set_instances.insert().values(
                        set_id=set_id,
                        number=each.number,
                        domain_id=each.domain_id,
                        disk_id=each.disk_id,
                        encryption_at_host=each.encryption_at_host,
                    )
                )

    def set_disk(self, set_id: UUID, number: int, disk_id: UUID) -> None:
        """Set the id of the disk about to be made for an instance."""
        with writing(self._engine) as connection:
            connection.execute(
                scale_set_instances.update()
                .where(scale_set_instances.c.set_id == set_id, scale_set_instances.c.number == number)
                .values(disk_id=disk_id)
            )

    def forget(self, set_id: UUID, number: int) -> None:
        """Remove an instance whose domain and disk are gone."""
        with writing(self._engine) as connection:
            connection.execute(
                scale_set_instances.delete().where(
                    scale_set_instances.c.set_id == set_id, scale_set_instances.c.number == number
                )
            )

    def remove(self, set_id: UUID) -> None:
        """Remove a set with its instances."""
        with writing(self._engine) as connection:
            connection.execute(scale_set_instances.delete().where(scale_set_instances.c.set_id == set_id))
            connection.execute(scale_sets.delete().where(scale_sets.c.id == set_id))

    def _select(self, condition: sa.ColumnElement[bool]) -> list[ScaleSet]:
        with reading(self._engine) as connection:
            sets = connection.execute(sa.select(scale_sets).where(condition)).all()
            wanted = scale_set_instances.c.set_id.in_([row.id for row in sets])
            rows = connection.execute(
                sa.select(scale_set_instances).where(wanted).order_by(scale_set_instances.c.number)
            ).all()
        return [
            ScaleSet(
                id=row.id,
                name=row.name,
                definition=row.definition,
                image_id=row.image_id,
                size=row.size,
                encryption_at_host=row.encryption_at_host,
                created=datetime.fromisoformat(row.created),
                is_deleting=row.is_deleting,
                instances=tuple(
                    Instance(each.number, each.domain_id, each.disk_id, each.encryption_at_host)
                    for each in rows
                    if each.set_id == row.id
                ),
            )
            for row in sorted(sets, key=attrgetter("name"))
        ]
