"""Which of two databases is the store: marks of a store that has moved, and of an unfinished copy.

The mark takes the place of the schema's revision, so that every version of virt-sse refuses the database. The
tables of a moved store are renamed as well: a process that opened the store before the move fails, too.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection

from virt_sse.errors import StoreError, StoreMovedError
from virt_sse.store.schema import SCHEMA
from virt_sse.store.tables import metadata

MOVED_PREFIX = "moved_"
"""Of the names of a moved store's tables."""

_MOVED, _COPYING = "moved", "copying"
_destination = sa.table("moved_to", sa.column("place", sa.Text))


def described(url: URL) -> str:
    """A database in words: without user, password and options."""
    if url.get_backend_name() == "sqlite":
        return f"SQLite file {url.database}"
    host = url.host or url.query.get("host") or "the default host"
    hosts = host if isinstance(host, str) else ", ".join(host)
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL database {url.database} at {hosts}{port}"


def refuse_marked(connection: Connection, revision: str | None) -> None:
    """Refuse a database that is not the store any more, or not yet.

    :param revision: in the database.
    :raise StoreMovedError: When the store has moved elsewhere.
    :raise StoreError: When the database is an unfinished copy.
    """
    if revision == _MOVED:
        raise StoreMovedError(
            f"the store has moved to the {destination(connection)}",
            hint="set url in [store] of config.toml to the new database, on every host",
        )
    if revision == _COPYING:
        raise StoreError(
            "the database is an unfinished copy of a store",
            hint="repeat 'virt-sse store migrate' on the host where the command was interrupted",
        )


def is_moved(revision: str | None) -> bool:
    """Whether *revision* is the mark of a moved store."""
    return revision == _MOVED


def is_copy(revision: str | None) -> bool:
    """Whether *revision* is the mark of an unfinished copy."""
    return revision == _COPYING


def destination(connection: Connection) -> str | None:
    """The place of the store that has moved, as in :func:`described`."""
    place: str | None = connection.scalar(sa.select(_destination.c.place))
    return place


def mark_copying(connection: Connection) -> None:
    """Mark a database as an unfinished copy."""
    _mark(connection, _COPYING)


def mark_current(connection: Connection) -> None:
    """Make a complete copy the store."""
    _mark(connection, SCHEMA)


def mark_moved(connection: Connection, place: str) -> None:
    """Give up a store in favour of the database *place*; the content stays, under other names."""
    for table in metadata.sorted_tables:
        connection.exec_driver_sql(f"ALTER TABLE {table.name} RENAME TO {MOVED_PREFIX}{table.name}")
    connection.exec_driver_sql("CREATE TABLE moved_to (place TEXT NOT NULL)")
    connection.execute(_destination.insert().values(place=place))
    _mark(connection, _MOVED)


def _mark(connection: Connection, revision: str) -> None:
    connection.execute(sa.text("UPDATE alembic_version SET version_num = :new"), {"new": revision})
