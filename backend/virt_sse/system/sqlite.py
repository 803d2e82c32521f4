"""SQLite databases with SQLAlchemy: each change is a transaction that survives kill -9 and power loss."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

READ_ONLY = {"virt_sse_read_only": True}
"""Execution options of a connection without a write lock; each statement sees its own snapshot."""


def sqlite_engine(url: URL, *, busy_seconds: float, **options: Any) -> Engine:
    """An engine for the database *url*. The file must exist: SQLite would create a world-readable file.

    :param busy_seconds: how long a transaction waits for a concurrent transaction.
    :param options: further options of :func:`sqlalchemy.create_engine`.
    """
    engine = sa.create_engine(url, connect_args={"timeout": busy_seconds}, **options)
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def reason(exc: Exception) -> str:
    """The driver's message on one line, without the statement and parameters that SQLAlchemy adds.

    An error raised by SQLAlchemy itself is returned as text. Of a PostgreSQL server's error, the message
    without the details, which may quote rows.
    """
    cause = getattr(exc, "orig", None) or exc
    message = getattr(getattr(cause, "diag", None), "message_primary", None)
    return " ".join((message or str(cause) or type(exc).__name__).split())


def _set_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # else the driver begins transactions late, and none for reads
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    """Take the write lock at once: a transaction must not fail as busy between its reads and its writes."""
    if not READ_ONLY.items() <= connection.get_execution_options().items():
        connection.exec_driver_sql("BEGIN IMMEDIATE")
