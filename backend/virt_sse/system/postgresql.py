"""PostgreSQL databases with SQLAlchemy and psycopg: limits of each wait, and TLS by default."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

DRIVER = "postgresql+psycopg"

_CONNECT_SECONDS = 5
_MOST_CONNECTIONS = 16
_READ_ONLY_TRANSACTION = "25006"

_DEFAULTS: dict[str, Any] = {
    "connect_timeout": _CONNECT_SECONDS,
    "sslmode": "verify-full",  # libpq's own default accepts any server; sockets of this machine ignore TLS
    "application_name": "virt-sse",
    # A vanished server is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Defaults of libpq's connection parameters; options in the URL take precedence."""


def postgresql_engine(
    url: URL,
    *,
    busy_seconds: float,
    idle_seconds: float = 60,
    kept_connections: int = 1,
    parameters: Mapping[str, str] | None = None,
) -> Engine:
    """An engine for the database *url*. Connections that broke while unused are replaced.

    :param busy_seconds: how long a statement waits for the lock of a concurrent transaction.
    :param idle_seconds: how long a transaction waits for its next statement: a stopped or vanished host keeps
        no locks.
    :param kept_connections: how many idle connections are kept. With one per process, 100 hosts fit into a
        server's default limit.
    :param parameters: further connection parameters of libpq; options in the URL take precedence.
    :raise ImportError: When psycopg is not installed.
    """
    settings = {
        "lock_timeout": round(busy_seconds * 1000),
        "idle_in_transaction_session_timeout": round(idle_seconds * 1000),
        "synchronous_commit": "on",  # a DEK is durable before an image is formatted with the DEK
        "random_page_cost": "1.1",  # small tables: their indices are in memory, and cheaper than scans
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    defaults = {**_DEFAULTS, **(parameters or {}), "options": options}
    return sa.create_engine(
        url.set(drivername=DRIVER),
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
        pool_pre_ping=True,
        pool_size=kept_connections,
        max_overflow=_MOST_CONNECTIONS - kept_connections,
        hide_parameters=True,
    )


def serialise(connection: Connection, *scope: str) -> None:
    """Run transactions with the same *scope* one after the other; this call waits for the others.

    SQLite's writing transactions run one after the other without a lock.
    """
    if connection.dialect.name == "postgresql":
        digest = hashlib.sha256("\0".join(scope).encode()).digest()
        key = sa.literal(int.from_bytes(digest[:8], "big", signed=True), sa.BigInteger)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))


def sqlstate(exc: Exception) -> str:
    """The code of a server's error (PostgreSQL, appendix "Error Codes"); empty for other errors."""
    return getattr(getattr(exc, "orig", None), "sqlstate", None) or ""


def is_read_only(exc: Exception) -> bool:
    """Whether a server refused a change because it takes no changes now, for example after a failover."""
    return sqlstate(exc) == _READ_ONLY_TRANSACTION
