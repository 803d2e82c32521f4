"""The vault's SQLite database: every change one transaction that survives a kill and a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from virt_sse.errors import VaultError
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.system.sqlite import READ_ONLY, reason, sqlite_engine
from virt_sse.vault.home import tables
from virt_sse.vault.refusals import FailureRefusal

_BUSY_TIMEOUT_SECONDS = 10
_CONNECTIONS = 16


class Database:
    """Connections to the database at *path*, made if it is not there. Threads may share one.

    :raise VaultError: When it cannot be opened, is damaged, or is a newer version's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = _engine(path)
        try:
            with self._engine.begin() as connection:
                _bring_up_to_date(connection)
        except sa.exc.SQLAlchemyError as exc:
            self._engine.dispose()
            raise VaultError(f"cannot open {path}: {reason(exc)}") from None
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that changes things: all of it, durably, or nothing.

        :raise Refusal: When the database cannot take it: a full disk, for one.
        """
        with _refusing(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for one statement that changes nothing.

        :raise Refusal: When the database does not answer.
        """
        with _refusing(), self._engine.connect() as connection:
            yield connection.execution_options(**READ_ONLY)

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()


def _engine(path: Path) -> Engine:
    if not path.exists():  # SQLite itself would make it readable to all
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    url = URL.create("sqlite", database=str(path))
    return sqlite_engine(url, busy_seconds=_BUSY_TIMEOUT_SECONDS, pool_size=_CONNECTIONS)


def _bring_up_to_date(connection: Connection) -> None:
    schema = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if schema > tables.SCHEMA:
        raise VaultError(
            f"the vault's database has schema {schema}, which this virt-sse does not know",
            hint="it was written by a newer version",
        )
    if schema < tables.SCHEMA:
        tables.metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {tables.SCHEMA}")


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
