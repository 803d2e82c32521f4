"""Disk encryption sets in the store."""

from __future__ import annotations

import contextlib
from datetime import datetime
from operator import attrgetter
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from virt_sse.errors import (
    EncryptionSetExistsError,
    EncryptionSetInUseError,
    EncryptionSetNotFoundError,
    PolicyError,
)
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType, Placement
from virt_sse.store.engine import reading, writing
from virt_sse.store.statements import is_storable, refusing
from virt_sse.store.tables import disks, encryption_sets
from virt_sse.system.postgresql import serialise


class EncryptionSetStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, encryption_set: EncryptionSet, *, limit: int | None) -> None:
        """Add a set.

        :param limit: maximum number of sets per subscription and region; ``None`` for no limit.
        :raise EncryptionSetExistsError: When the name is taken.
        :raise PolicyError: When the limit is reached.
        """
        exists = EncryptionSetExistsError(f"disk encryption set {encryption_set.name!r} exists already")
        with writing(self._engine) as connection:
            if connection.scalar(
                sa.select(encryption_sets.c.id).where(encryption_sets.c.name == encryption_set.name)
            ):
                raise exists
            serialise(connection, "encryption-sets", encryption_set.subscription, encryption_set.region)
            there = connection.scalar(
                sa.select(sa.func.count()).where(
                    encryption_sets.c.subscription == encryption_set.subscription,
                    encryption_sets.c.region == encryption_set.region,
                )
            )
            if limit is not None and there is not None and there >= limit:
                raise PolicyError(
                    f"subscription {encryption_set.subscription!r} has {there} disk encryption sets "
                    f"in region {encryption_set.region!r}; more are not allowed"
                )
            with refusing(exists):
                connection.execute(
                    encryption_sets.insert().values(id=encryption_set.id, **_values(encryption_set))
                )

    def get(self, name: str) -> EncryptionSet:
        """The set with the given name or id.

        :raise EncryptionSetNotFoundError: When no set has this name or id.
        """
        found = self._select(encryption_sets.c.name == name) if is_storable(name) else []
        if not found:
            with contextlib.suppress(ValueError):
                found = self._select(encryption_sets.c.id == UUID(name))
        if not found:
            raise EncryptionSetNotFoundError(
                f"no disk encryption set {name[:80]!r}", hint="'virt-sse des list' shows all sets"
            )
        return found[0]

    def all(self) -> list[EncryptionSet]:
        """All sets, sorted by name."""
        return self._select(sa.true())

    def update(self, encryption_set: EncryptionSet) -> None:
        """Replace the set with the id of *encryption_set*.

        :raise EncryptionSetNotFoundError: When the set was deleted.
        """
        with writing(self._engine) as connection:
            updated = connection.execute(
                encryption_sets.update()
                .where(encryption_sets.c.id == encryption_set.id)
                .values(**_values(encryption_set))
            )
            if updated.rowcount != 1:
                raise EncryptionSetNotFoundError(f"disk encryption set {encryption_set.name!r} was deleted")

    def remove(self, encryption_set: EncryptionSet) -> None:
        """Delete an empty set.

        :raise EncryptionSetInUseError: When the set contains disks.
        """
        with writing(self._engine) as connection:
            name = connection.scalar(
                sa.select(disks.c.name).where(disks.c.encryption_set_id == encryption_set.id).limit(1)
            )
            in_use = EncryptionSetInUseError(
                f"disk {name!r} is in disk encryption set {encryption_set.name!r}"
                if name
                else f"a new disk is in disk encryption set {encryption_set.name!r}",
                hint="move its disks to another set, or delete the disks, before deleting the set",
            )
            if name is not None:
                raise in_use
            with refusing(in_use):
                connection.execute(encryption_sets.delete().where(encryption_sets.c.id == encryption_set.id))

    def _select(self, condition: sa.ColumnElement[bool]) -> list[EncryptionSet]:
        with reading(self._engine) as connection:
            found = map(_encryption_set, connection.execute(sa.select(encryption_sets).where(condition)))
            return sorted(found, key=attrgetter("name"))


def _values(encryption_set: EncryptionSet) -> dict[str, object]:
    return {
        "name": encryption_set.name,
        "key_provider": encryption_set.key.provider,
        "key_name": encryption_set.key.name,
        "key_version": encryption_set.key_version,
        "encryption_type": encryption_set.encryption_type.value,
        "automatic_rotation": encryption_set.automatic_rotation,
        "subscription": encryption_set.subscription,
        "region": encryption_set.region,
        "tenant": encryption_set.tenant,
        "identity": encryption_set.identity,
        "revocation": encryption_set.revocation.value,
        "grace_seconds": encryption_set.grace_seconds,
        "created": encryption_set.created.isoformat(),
        "placement": encryption_set.placement.value if encryption_set.placement else None,
    }


def _encryption_set(row: Row[Any]) -> EncryptionSet:
    return EncryptionSet(
        id=row.id,
        name=row.name,
        key=KeyRef(row.key_provider, row.key_name),
        key_version=row.key_version,
        encryption_type=EncryptionType(row.encryption_type),
        automatic_rotation=row.automatic_rotation,
        subscription=row.subscription,
        region=row.region,
        tenant=row.tenant,
        identity=row.identity,
        revocation=RevocationAction(row.revocation),
        grace_seconds=row.grace_seconds,
        created=datetime.fromisoformat(row.created),
        placement=Placement(row.placement) if row.placement else None,
    )
