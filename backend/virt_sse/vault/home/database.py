"""The vault's SQLite database: every change is one transaction that survives a kill and a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from virt_sse.errors import VaultError
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.system.migrations import UnknownRevisionError, revision_of, upgrade
from virt_sse.system.sqlite import READ_ONLY, reason, sqlite_engine
from virt_sse.vault.refusals import FailureRefusal

SCHEMA = "0002"
"""The newest migration. A constant, so that up-to-date databases are recognised without importing Alembic."""

_DEVELOPMENT_SCHEMAS = range(3)
"""SQLite's ``user_version`` of an empty database (0) and of databases from before Alembic."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_SECONDS = 10
_CONNECTIONS = 16


class Database:
    """Connections to the database at *path*, created and migrated if necessary. Thread-safe.

    :raise VaultError: When the database cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = _engine(path)
        try:
            with self._engine.begin() as connection:
                _migrate(connection)
        except sa.exc.SQLAlchemyError as exc:
            self._engine.dispose()
            raise VaultError(f"cannot open {path}: {reason(exc)}") from None
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction for changes: all of them durable, or none.

        :raise Refusal: When the database cannot be written, for example because the disk is full.
        """
        with _refusing(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a connection for one read-only statement.

        :raise Refusal: When the database cannot be read.
        """
        with _refusing(), self._engine.connect() as connection:
            yield connection.execution_options(**READ_ONLY)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _engine(path: Path) -> Engine:
    if not path.exists():  # a file created by SQLite would be world-readable
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    url = URL.create("sqlite", database=str(path))
    return sqlite_engine(url, busy_seconds=_BUSY_TIMEOUT_SECONDS, pool_size=_CONNECTIONS)


def _migrate(connection: Connection) -> None:
    schema = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if revision_of(connection) is None and schema not in _DEVELOPMENT_SCHEMAS:
        raise _unknown(schema)
    try:
        upgrade(connection, _MIGRATIONS, SCHEMA)
    except UnknownRevisionError as exc:
        raise _unknown(revision_of(connection)) from exc


def _unknown(schema: object) -> VaultError:
    return VaultError(
        f"the vault's database has schema {schema}, unknown to this virt-sse",
        hint="a newer version has written the database",
    )


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as exc:
        raise DatabaseRefusal(reason(exc)) from None


class DatabaseRefusal(FailureRefusal):
    """503: the database failed."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "The vault cannot read or write its database now.", f"the vault's database failed: {why}"
        )
