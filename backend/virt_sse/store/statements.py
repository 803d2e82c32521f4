"""Statements with the same effect on SQLite and PostgreSQL, also in a race."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from virt_sse.errors import VirtSseError
from virt_sse.store.tables import counters, metadata


def lock_tables(connection: Connection) -> None:
    """Let no other transaction change the store until the end of this transaction; queries go on.

    SQLite's writing transactions have this lock from their beginning.
    """
    if connection.dialect.name == "postgresql":
        names = ", ".join(table.name for table in metadata.sorted_tables)
        connection.exec_driver_sql(f"LOCK TABLE {names} IN SHARE ROW EXCLUSIVE MODE")


def upsert(
    connection: Connection, table: sa.Table, key: Mapping[str, object], values: Mapping[str, object]
) -> None:
    """Add a row, or change the row with this primary key."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(**key, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=dict(values)))


def next_number(connection: Connection, series: str) -> int:
    """The next number of a series: one more than the last, also if rows with a number were deleted.

    Transactions with numbers of one series are committed in the order of the numbers.
    """
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(counters).values(name=series, value=1)
    counted = statement.on_conflict_do_update(
        index_elements=[counters.c.name], set_={"value": counters.c.value + 1}
    )
    return int(connection.execute(counted.returning(counters.c.value)).scalar_one())


@contextlib.contextmanager
def refusing(error: VirtSseError) -> Iterator[None]:
    """Raise *error* if a unique or foreign key constraint refuses a statement of the block.

    For a single statement: the transaction cannot go on.
    """
    try:
        yield
    except sa.exc.IntegrityError:
        raise error from None


def is_storable(text: str) -> bool:
    """Whether a column can hold *text*: PostgreSQL stores no NUL, and UTF-8 has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
