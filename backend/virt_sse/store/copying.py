"""Copies of a whole store from one database into another, verified row by row."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from virt_sse.errors import StoreError
from virt_sse.store import ownership
from virt_sse.store.engine import memory_engine, named_errors, open_engine, opening, parsed_url
from virt_sse.store.rows import UNFINISHED_STATES
from virt_sse.store.statements import lock_tables
from virt_sse.store.tables import disks, metadata
from virt_sse.system.database_url import sqlite_url
from virt_sse.system.migrations import revision_of

_ROWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class TableContent:
    """The content of a table.

    :ivar digest: SHA-256 (hex) over all rows, in any order.
    """

    rows: int
    digest: str


def dump(url: str, memory: sqlite3.Connection) -> None:
    """Copy the store at *url* into a database in memory: the state at one moment, also while in use.

    :param memory: an empty database.
    :raise StoreError: When the store cannot be read.
    """
    with (
        _opened(open_engine(url)) as store,
        named_errors(store),
        store.connect() as source,
        memory_engine(memory).begin() as target,
    ):
        source.execution_options(isolation_level="REPEATABLE READ")
        copy_rows(source, target)


def load(url: str, backup: Path) -> None:
    """Copy a store in the SQLite file *backup* into the empty store at *url*, all or nothing.

    :raise StoreError: When the store is not empty, or a database fails.
    """
    with (
        _opened(open_engine(sqlite_url(backup))) as saved,
        _opened(open_engine(url)) as store,
        named_errors(store),
        saved.begin() as source,
        store.begin() as target,
    ):
        if not is_empty(target):
            raise StoreError(
                "the host has a store: its PostgreSQL database has rows", hint="name an empty database first"
            )
        copy_rows(source, target)


def move(url: str, target_url: str, place: str) -> Mapping[str, TableContent]:
    """Copy the store at *url* into an empty database, and mark the store as moved.

    :param place: of the new database, as in :func:`virt_sse.store.ownership.described`.
    :raise StoreError: When the new database has rows of another store, a killed command left work in an
        SQLite store, or a database fails.
    """
    with (
        _opened(open_engine(url)) as old,
        _target(target_url) as new,
        named_errors(old),
        old.begin() as source,
    ):
        lock_tables(source)
        _refuse_unfinished(source)
        with named_errors(new), new.begin() as target:
            lock_tables(target)
            if ownership.is_copy(revision_of(target)):
                clear(target)  # of a killed move, which had not marked the old store
            elif not is_empty(target):
                raise StoreError(f"the {place} has rows of another store", hint="name an empty database")
            found = copy_rows(source, target)
            ownership.mark_copying(target)
        ownership.mark_moved(source, place)
    return found


def _refuse_unfinished(source: Connection) -> None:
    """Refuse unfinished work in SQLite, without a lease: in the new store, any host could undo the work."""
    query = sa.select(disks.c.name).where(disks.c.state.in_(UNFINISHED_STATES)).limit(1)
    if source.dialect.name == "sqlite" and (name := source.scalar(query)) is not None:
        raise StoreError(
            f"work on disk {name!r} is not finished",
            hint="'virt-sse disk list' finishes the work of killed commands; copies under way must end",
        )


def moved_contents(url: str) -> tuple[Mapping[str, TableContent] | None, str | None]:
    """The content of a store that has moved, and its new place; both ``None`` if the store has not moved.

    :raise StoreError: When the database fails.
    """
    with _unchecked(url) as engine, engine.connect() as connection:
        if not ownership.is_moved(revision_of(connection)):
            return None, None
        place = ownership.destination(connection)
        return contents(connection, prefix=ownership.MOVED_PREFIX), place


def settle_copy(url: str, expected: Mapping[str, TableContent]) -> None:
    """Make a complete copy the store; nothing to do for a store in use.

    :param expected: the content of the old store.
    :raise StoreError: When the copy is not complete, or the database fails.
    """
    with _unchecked(url) as engine, engine.begin() as connection:
        if ownership.is_copy(revision_of(connection)):
            check_same(expected, contents(connection))
            ownership.mark_current(connection)


@contextlib.contextmanager
def _target(url: str) -> Iterator[Engine]:
    """A database with the tables of a store, also an unfinished copy."""
    with _unchecked(url) as engine:
        with engine.connect() as connection:
            is_copy = ownership.is_copy(revision_of(connection))
        if not is_copy:
            open_engine(url).dispose()
        yield engine


@contextlib.contextmanager
def _unchecked(url: str) -> Iterator[Engine]:
    """A database that may be a moved store or an unfinished copy. A missing SQLite file is made."""
    parsed = parsed_url(url)
    if parsed.drivername == "sqlite" and not Path(parsed.database or "").exists():
        open_engine(url).dispose()
    with opening(parsed) as engine, _opened(engine):
        yield engine


@contextlib.contextmanager
def _opened(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


def contents(connection: Connection, *, prefix: str = "") -> dict[str, TableContent]:
    """The content of each table.

    :param prefix: of the tables' names in the database.
    """
    found = {}
    for table in metadata.sorted_tables:
        renamed = table.to_metadata(sa.MetaData(), name=prefix + table.name) if prefix else table
        columns = [renamed.c[column.name] for column in table.columns]
        digests = sorted(
            hashlib.sha256(repr(tuple(row)).encode()).digest()
            for row in connection.execute(sa.select(*columns).execution_options(yield_per=_ROWS_AT_ONCE))
        )
        found[table.name] = TableContent(len(digests), hashlib.sha256(b"".join(digests)).hexdigest())
    return found


def is_empty(connection: Connection) -> bool:
    """Whether no table has a row."""
    return not any(
        connection.scalar(sa.select(sa.exists().select_from(table))) for table in metadata.sorted_tables
    )


def clear(connection: Connection) -> None:
    """Delete all rows."""
    for table in reversed(metadata.sorted_tables):
        connection.execute(table.delete())


def copy_rows(source: Connection, target: Connection) -> dict[str, TableContent]:
    """Copy all rows into the empty tables of *target*, and compare both databases.

    Both connections are in a transaction, in which no other process changes *source*.

    :return: the content by table.
    :raise StoreError: When the copy differs from the source.
    """
    for table in metadata.sorted_tables:
        rows = source.execute(sa.select(table).execution_options(yield_per=_ROWS_AT_ONCE)).mappings()
        for some in rows.partitions(_ROWS_AT_ONCE):
            target.execute(table.insert(), [dict(row) for row in some])
    found = contents(source)
    check_same(found, contents(target))
    return found


def check_same(source: Mapping[str, TableContent], target: Mapping[str, TableContent]) -> None:
    """Compare the contents of two stores.

    :raise StoreError: When a table differs.
    """
    for name, content in source.items():
        if target[name] != content:
            raise StoreError(
                f"table {name} has {content.rows} rows, its copy {target[name].rows} rows or other content"
            )
