"""Keys in the vault's database."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from virt_sse.vault.home.database import Database
from virt_sse.vault.home.tables import key_permissions, keys, leftovers, versions
from virt_sse.vault.keys.material import PublicKey
from virt_sse.vault.keys.records import Attributes, Deletion, KeyVersion, Leftover
from virt_sse.vault.refusals import conflict, key_not_found, unavailable

_LIVE = keys.c.deleted.is_(None)
_NEWEST = versions.c.sequence.desc()


class KeyStore:
    """Queries and changes of keys, each in one transaction.

    A change that depends on the present state takes a function, called inside the transaction with the state
    just read: a concurrent change, also by another instance, comes before or after, never in between.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, record: KeyVersion, *, announced: bool = False) -> KeyVersion:
        """Add a version, and the key with its first version.

        :param announced: whether the version's material was announced by :meth:`announce`.
        :return: the version.
        :raise Refusal: When a deleted key has the name, or the announced material was destroyed.
        """
        with self._database.writing() as connection:
            _refuse_deleted(connection, record.name)
            present = _present_name(connection, record.name)
            if present not in (None, record.name):
                raise conflict(f"A key named {present} was made meanwhile.", "KeyAlreadyExists")
            if present is None:
                connection.execute(keys.insert().values(name=record.name))
            _take_up(connection, [record], announced=announced)
        return record

    def add_rotated(
        self,
        name: str,
        rotated: Callable[[KeyVersion, str | None], KeyVersion],
        *,
        announced: bool = False,
    ) -> KeyVersion:
        """Add a version to a live key.

        :param rotated: makes the new version from the newest version and the rotation policy.
        :param announced: as for :meth:`add`.
        :return: the new version.
        :raise Refusal: When there is no live key of that name, or the announced material was destroyed.
        """
        with self._database.writing() as connection:
            newest = _live(connection, name, "")
            record = rotated(newest, _policy(connection, name))
            _take_up(connection, [record], announced=announced)
        return record

    def restore(
        self, records: Sequence[KeyVersion], policy: str | None, check: Callable[[KeyVersion], None]
    ) -> None:
        """Add a key with all versions, oldest first.

        :param check: checks that a version's material exists; a refusal restores nothing.
        :raise Refusal: When the name is taken.
        """
        name = records[0].name
        with self._database.writing() as connection:
            _refuse_deleted(connection, name)
            if present := _present_name(connection, name):
                raise conflict(f"A key named {present} exists already.", "KeyAlreadyExists")
            connection.execute(keys.insert().values(name=name, policy=policy))
            for record in records:
                check(record)
            _take_up(connection, records)

    def present_name(self, name: str) -> str | None:
        """The name of the key, live or deleted, that differs from *name* in case at most."""
        with self._database.reading() as connection:
            return _present_name(connection, name)

    def get(self, name: str, version: str = "") -> KeyVersion:
        """Return a version, by default the newest.

        :raise Refusal: When the version does not exist, or the key is deleted.
        """
        with self._database.reading() as connection:
            return _live(connection, name, version)

    def versions(self, name: str) -> list[KeyVersion]:
        """List all versions of a live key, oldest first.

        :raise Refusal: When there is no such key.
        """
        return self.versions_and_policy(name)[0]

    def versions_and_policy(self, name: str) -> tuple[list[KeyVersion], str | None]:
        """List all versions of a live key, oldest first, with the rotation policy of the same moment.

        :raise Refusal: When there is no such key.
        """
        query = sa.select(versions, keys.c.policy).join(keys).where(_LIVE, keys.c.name == name)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(versions.c.sequence)).all()
        if not rows:
            raise key_not_found(name)
        return [_record(row) for row in rows], rows[0].policy

    def newest(self, *, after: str, limit: int) -> list[KeyVersion]:
        """List the newest version of each live key with a name after *after*, by name; at most *limit*."""
        with self._database.reading() as connection:
            rows = connection.execute(_newest_of_each(_LIVE, after).limit(limit))
            return [_record(row) for row in rows]

    def deleted(self, *, after: str, limit: int) -> list[tuple[KeyVersion, Deletion]]:
        """List the newest version of each deleted key with a name after *after*, by name; at most *limit*."""
        query = _newest_of_each(keys.c.deleted.is_not(None), after).limit(limit)
        with self._database.reading() as connection:
            return [(_record(row), Deletion(row.deleted, row.purge)) for row in connection.execute(query)]

    def get_deleted(self, name: str) -> tuple[KeyVersion, Deletion]:
        """Return the newest version of a deleted key.

        :raise Refusal: When no deleted key has that name.
        """
        with self._database.reading() as connection:
            return _deleted(connection, name)

    def change(self, name: str, version: str, changed: Callable[[KeyVersion], KeyVersion]) -> KeyVersion:
        """Change the attributes, operations and tags of a version.

        :param version: empty for the newest version.
        :param changed: makes the changed version from the present version; a refusal changes nothing.
        :return: the changed version.
        :raise Refusal: When the version does not exist, or the key is deleted.
        """
        with self._database.writing() as connection:
            record = changed(_live(connection, name, version))
            connection.execute(
                versions.update()
                .where(versions.c.name == record.name, versions.c.version == record.version)
                .values(
                    enabled=record.attributes.enabled,
                    not_before=record.attributes.not_before,
                    expires=record.attributes.expires,
                    operations=json.dumps(record.operations),
                    tags=json.dumps(dict(record.tags)),
                    updated=record.updated,
                )
            )
        return record

    def delete(self, name: str, deletion: Deletion) -> KeyVersion:
        """Mark a live key as deleted, to be recovered or purged.

        :return: the newest version.
        :raise Refusal: When there is no live key of that name.
        """
        with self._database.writing() as connection:
            newest = _live(connection, name, "")
            _mark(connection, name, deleted=deletion.deleted, purge=deletion.purge)
        return newest

    def recover(self, name: str) -> KeyVersion:
        """Mark a deleted key as live again.

        :return: the newest version.
        :raise Refusal: When no deleted key has that name.
        """
        with self._database.writing() as connection:
            newest, _ = _deleted(connection, name)
            _mark(connection, name, deleted=None, purge=None)
        return newest

    def purge(self, name: str, *, kept_outside: Collection[str], due: int | None = None) -> None:
        """Purge a deleted key irrecoverably.

        :param kept_outside: types of keys with material outside the database, to be listed as leftover.
        :param due: purge only if the retention period has ended at this time, in seconds since 1970.
        :raise Refusal: When no deleted key has that name, or the retention period has not ended.
        """
        columns = ("name", "version", "key_type")
        found = (
            sa.select(*(versions.c[column] for column in columns))
            .join(keys)
            .where(keys.c.name == name, keys.c.deleted.is_not(None), versions.c.key_type.in_(kept_outside))
        )
        with self._database.writing() as connection:
            _, deletion = _deleted(connection, name)
            if due is not None and deletion.purge > due:  # recovered and deleted again meanwhile
                raise conflict(f"The retention period of the deleted key {name} has not ended.")
            connection.execute(leftovers.insert().from_select(columns, found))
            connection.execute(keys.delete().where(keys.c.name == name))
            connection.execute(key_permissions.delete().where(key_permissions.c.key == name.lower()))

    def announce(self, leftover: Leftover, now: int) -> None:
        """List material as leftover before it is made outside the database, until its version is added.

        :param now: in seconds since 1970.
        """
        with self._database.recording() as connection:
            connection.execute(leftovers.insert().values(**dataclasses.asdict(leftover), announced=now))

    def leftovers(self, before: int | None) -> list[Leftover]:
        """List material outside the database without a version.

        :param before: leaves out material announced later, in seconds since 1970: it may be being made.
        """
        columns = (leftovers.c.name, leftovers.c.version, leftovers.c.key_type)
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(*columns).where(_left_over(before)))
            return [Leftover(*row) for row in rows]

    def dispose(self, leftover: Leftover, before: int | None, destroy: Callable[[], None]) -> None:
        """Destroy leftover material, and remove it from the list; no version can take it up meanwhile.

        :param before: as for :meth:`leftovers`.
        :param destroy: destroys the material, if it exists; called only while the material is left over.
        """
        found = sa.select(leftovers.c.version).where(_is(leftover), _left_over(before))
        with self._database.writing() as connection:
            if connection.scalar(found) is not None:
                destroy()
                connection.execute(leftovers.delete().where(_is(leftover)))

    def key_types(self, name: str) -> frozenset[str]:
        """Return the types of a key's versions, live or deleted; empty if there is no such key."""
        with self._database.reading() as connection:
            found = sa.select(versions.c.key_type).where(versions.c.name == name).distinct()
            return frozenset(connection.scalars(found))

    def due_for_purge(self, now: int) -> list[str]:
        """List the names of the deleted keys whose retention period has ended."""
        with self._database.reading() as connection:
            return list(connection.scalars(sa.select(keys.c.name).where(keys.c.purge <= now)))

    def policy(self, name: str) -> str | None:
        """Return a key's rotation policy as given, or ``None``.

        :raise Refusal: When there is no such key.
        """
        with self._database.reading() as connection:
            return _policy(connection, name)

    def set_policy(self, name: str, policy: Callable[[str | None], str]) -> None:
        """Store a key's rotation policy.

        :param policy: makes the new policy from the present policy.
        :raise Refusal: When there is no such key.
        """
        with self._database.writing() as connection:
            _mark(connection, name, policy=policy(_policy(connection, name)))

    def policies(self) -> dict[str, str]:
        """Return the rotation policies of all live keys that have a policy, by name."""
        query = sa.select(keys.c.name, keys.c.policy).where(_LIVE, keys.c.policy.is_not(None))
        with self._database.reading() as connection:
            return {row.name: row.policy for row in connection.execute(query)}

    def count(self) -> tuple[int, int]:
        """Count the live keys and the deleted keys."""
        query = sa.select(sa.func.count(), sa.func.count(keys.c.deleted)).select_from(keys)
        with self._database.reading() as connection:
            every, deleted = connection.execute(query).one()
        return every - deleted, deleted


def _live(connection: Connection, name: str, version: str) -> KeyVersion:
    query = sa.select(versions).join(keys).where(_LIVE, keys.c.name == name)
    query = query.where(versions.c.version == version) if version else query.order_by(_NEWEST).limit(1)
    row = connection.execute(query).first()
    if row is None:
        raise key_not_found(name, version)
    return _record(row)


def _deleted(connection: Connection, name: str) -> tuple[KeyVersion, Deletion]:
    query = (
        sa.select(versions, keys.c.deleted, keys.c.purge)
        .join(keys)
        .where(keys.c.deleted.is_not(None), keys.c.name == name)
        .order_by(_NEWEST)
        .limit(1)
    )
    row = connection.execute(query).first()
    if row is None:
        raise key_not_found(name)
    return _record(row), Deletion(row.deleted, row.purge)


def _policy(connection: Connection, name: str) -> str | None:
    row = connection.execute(sa.select(keys.c.policy).where(_LIVE, keys.c.name == name)).first()
    if row is None:
        raise key_not_found(name)
    return None if row.policy is None else str(row.policy)


def _mark(connection: Connection, name: str, **values: object) -> None:
    connection.execute(keys.update().where(keys.c.name == name).values(**values))


def _newest_of_each(condition: sa.ColumnElement[bool], after: str) -> sa.Select[Any]:
    newest = sa.select(sa.func.max(versions.c.sequence)).group_by(versions.c.name)
    return (
        sa.select(versions, keys.c.deleted, keys.c.purge)
        .join(keys)
        .where(condition, keys.c.name > after, versions.c.sequence.in_(newest))
        .order_by(keys.c.name)
    )


def _present_name(connection: Connection, name: str) -> str | None:
    found = sa.select(keys.c.name).where(sa.func.lower(keys.c.name) == name.lower())
    return connection.scalar(found)


def _refuse_deleted(connection: Connection, name: str) -> None:
    same = sa.func.lower(keys.c.name) == name.lower()
    if connection.scalar(sa.select(keys.c.deleted).where(same)) is not None:
        raise conflict(
            f"Key {name} is currently in a deleted but recoverable state, and its name cannot be reused; "
            "in this state, the key can only be recovered or purged.",
            "ObjectIsDeletedButRecoverable",
        )


def _take_up(connection: Connection, records: Sequence[KeyVersion], *, announced: bool = False) -> None:
    """Add versions, and remove their material from the leftovers.

    :raise Refusal: When *announced* material is no longer listed, and therefore destroyed.
    """
    for record in records:
        listed = connection.execute(leftovers.delete().where(_is(record))).rowcount
        if announced and not listed:
            raise unavailable("Making the key has taken too long; ask again.")
    connection.execute(versions.insert(), [_values(record) for record in records])


def _is(named: KeyVersion | Leftover) -> sa.ColumnElement[bool]:
    return sa.and_(leftovers.c.name == named.name, leftovers.c.version == named.version)


def _left_over(before: int | None) -> sa.ColumnElement[bool]:
    """Whether neither a live nor a deleted key has the version, and no instance may be making it."""
    same = sa.and_(versions.c.name == leftovers.c.name, versions.c.version == leftovers.c.version)
    unused = ~sa.exists().where(same).correlate(leftovers)
    if before is None:
        return unused
    return sa.and_(unused, sa.or_(leftovers.c.announced.is_(None), leftovers.c.announced <= before))


def _values(record: KeyVersion) -> dict[str, object]:
    return {
        "name": record.name,
        "version": record.version,
        "key_type": record.key_type,
        "n": record.public.n.to_bytes((record.public.bits + 7) // 8, "big"),
        "e": record.public.e,
        "operations": json.dumps(record.operations),
        "enabled": record.attributes.enabled,
        "not_before": record.attributes.not_before,
        "expires": record.attributes.expires,
        "created": record.created,
        "updated": record.updated,
        "tags": json.dumps(dict(record.tags)),
        "stored": record.stored,
    }


def _record(row: Row[Any]) -> KeyVersion:
    return KeyVersion(
        name=row.name,
        version=row.version,
        key_type=row.key_type,
        public=PublicKey(int.from_bytes(row.n, "big"), row.e),
        operations=tuple(json.loads(row.operations)),
        attributes=Attributes(row.enabled, row.not_before, row.expires),
        created=row.created,
        updated=row.updated,
        tags=json.loads(row.tags),
        stored=row.stored,
    )
