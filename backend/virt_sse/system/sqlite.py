"""SQLite databases, by SQLAlchemy: every change one transaction that survives a kill and a power cut."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine

READ_ONLY = {"virt_sse_read_only": True}
"""Execution options of a connection that takes no write lock; each statement sees its own moment."""


def sqlite_engine(url: URL, *, busy_seconds: float, **options: Any) -> Engine:
    """Connections to the database of *url*. Its file is to be there: SQLite would make it readable to all.

    :param busy_seconds: how long a transaction waits for another one's end.
    :param options: what else :func:`sqlalchemy.create_engine` takes.
    """
    engine = sa.create_engine(url, connect_args={"timeout": busy_seconds}, **options)
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", _begin)
    return engine


def reason(exc: Exception) -> str:
    """What the driver says, in one line: SQLAlchemy adds the statement and its parameters. What that says
    without having asked the driver, as it is.
    """
    return " ".join(str(getattr(exc, "orig", exc) or type(exc).__name__).split())


def _set_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions late, and not for reads
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    """Take the write lock at once: a transaction that reads, then writes, never fails half-way as busy."""
    if not READ_ONLY.items() <= connection.get_execution_options().items():
        connection.exec_driver_sql("BEGIN IMMEDIATE")
