"""PostgreSQL databases with SQLAlchemy and psycopg: limits of each wait, and TLS by default."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine

DRIVER = "postgresql+psycopg"

_CONNECT_SECONDS = 5
_IDLE_MILLISECONDS = 60_000
_KEPT_CONNECTIONS, _FURTHER_CONNECTIONS = 1, 15
"""A host keeps one idle connection per process: 100 hosts fit into a server's default limit."""

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


def postgresql_engine(url: URL, *, busy_seconds: float) -> Engine:
    """An engine for the database *url*. Connections that broke while unused are replaced.

    :param busy_seconds: how long a statement waits for the lock of a concurrent transaction.
    :raise ImportError: When psycopg is not installed.
    """
    settings = {
        "lock_timeout": round(busy_seconds * 1000),
        "idle_in_transaction_session_timeout": _IDLE_MILLISECONDS,  # a stopped host keeps no locks
        "synchronous_commit": "on",  # a DEK is durable before an image is formatted with the DEK
        "random_page_cost": "1.1",  # small tables: their indices are in memory, and cheaper than scans
    }
    defaults = {**_DEFAULTS, "options": " ".join(f"-c {name}={value}" for name, value in settings.items())}
    return sa.create_engine(
        url.set(drivername=DRIVER),
        connect_args={name: value for name, value in defaults.items() if name not in url.query},
        pool_pre_ping=True,
        pool_size=_KEPT_CONNECTIONS,
        max_overflow=_FURTHER_CONNECTIONS,
        hide_parameters=True,
    )
