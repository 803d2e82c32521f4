"""The vault's database, SQLite or PostgreSQL: every change is one transaction that survives a kill.

Changes run one after the other, whichever instance of the vault makes them: a change may rest on what it has
read in its transaction.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url

from virt_sse.errors import VaultError
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.system.migrations import UnknownRevisionError, revision_of, upgrade
from virt_sse.system.postgresql import is_read_only, postgresql_engine, serialise
from virt_sse.system.sqlite import READ_ONLY, reason, sqlite_engine
from virt_sse.vault.home.tables import changes
from virt_sse.vault.refusals import FailureRefusal

SCHEMA = "0003"
"""The newest migration. A constant, so that up-to-date databases are recognised without importing Alembic."""

_DEVELOPMENT_SCHEMAS = range(3)
"""SQLite's ``user_version`` of an empty database (0) and of databases from before Alembic."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_SECONDS = 10
_IDLE_SECONDS = 5
_SQLITE_CONNECTIONS, _POSTGRESQL_CONNECTIONS = 16, 4


class Database:
    """Connections to the database at *url*, migrated if necessary. Thread-safe.

    :ivar shared: whether several instances of the vault may use the database: PostgreSQL.
    :param url: of SQLAlchemy, as from :meth:`~virt_sse.vault.home.layout.VaultDirectory.database_url`.
    :param create: create a missing SQLite file.
    :raise VaultError: When the database cannot be opened, is damaged, belongs to another program, or was
        written by a newer version.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        try:
            parsed = make_url(url)
        except (sa.exc.ArgumentError, ValueError):
            raise VaultError("invalid URL of the vault's database") from None  # it may have a password
        self.shared = parsed.drivername != "sqlite"
        self._turns = threading.Lock()
        named = "the vault's database" if self.shared else parsed.database
        try:
            self._engine = _postgresql(parsed) if self.shared else _sqlite(parsed, create=create)
        except ImportError as exc:
            raise VaultError(
                "a vault in PostgreSQL needs psycopg", hint="pip install 'virt-sse[postgresql]'"
            ) from exc
        try:
            with self._engine.begin() as connection:
                _migrate(connection)
        except sa.exc.SQLAlchemyError as exc:
            self._engine.dispose()
            raise VaultError(f"cannot open {named}: {reason(exc)}") from None
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction for changes: all of them durable, or none; no other change in between.

        On PostgreSQL, the row with the number of changes is the lock of the changes of all instances.

        :raise Refusal: When the database cannot be written, for example because the disk is full.
        """
        with self._turn(), self._refusing(), self._engine.begin() as connection:
            if self.shared:
                connection.execute(changes.update().values(number=changes.c.number + 1))
            yield connection

    @contextlib.contextmanager
    def recording(self) -> Iterator[Connection]:
        """Open a transaction for rows that no instance caches, where a constraint decides races.

        :raise Refusal: When the database cannot be written.
        """
        with self._refusing(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a connection for read-only statements; each statement has a snapshot of its own.

        :raise Refusal: When the database cannot be read.
        """
        options = {"isolation_level": "AUTOCOMMIT"} if self.shared else READ_ONLY
        with self._refusing(), self._engine.connect() as connection:
            yield connection.execution_options(**options)

    def changes(self) -> int:
        """How many changes the instances have made in a shared database; always 0 in SQLite.

        :raise Refusal: When the database cannot be read.
        """
        with self.reading() as connection:
            return connection.scalar(sa.select(changes.c.number)) or 0

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one change of this instance wait for the lock: if the instance stops, its other changes have no
        sessions whose time limits would follow each other.
        """
        if not self._turns.acquire(timeout=_BUSY_TIMEOUT_SECONDS):
            raise DatabaseRefusal("another change takes too long")
        try:
            yield
        finally:
            self._turns.release()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as exc:
            if is_read_only(exc):
                self._engine.dispose()  # after a failover, new connections reach the new primary
            raise DatabaseRefusal(reason(exc)) from None


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Name a failure of the database for a command, not for a client.

    :raise VaultError: When the block is refused because a component of the vault failed.
    """
    try:
        yield
    except FailureRefusal as refusal:
        raise VaultError(refusal.detail) from refusal


def insert_new(connection: Connection, table: sa.Table, **values: object) -> bool:
    """Insert a row unless its primary key is present; whether the row was inserted, also in a race."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(values).on_conflict_do_nothing().returning(sa.literal(1))
    return connection.scalar(statement) is not None


def _postgresql(url: URL) -> Engine:
    """Connect to PostgreSQL, to a primary alone: on a standby, a disabled key would still be enabled."""
    return postgresql_engine(
        url,
        busy_seconds=_BUSY_TIMEOUT_SECONDS,
        idle_seconds=_IDLE_SECONDS,
        kept_connections=_POSTGRESQL_CONNECTIONS,
        parameters={"target_session_attrs": "read-write", "application_name": "virt-sse vault"},
    )


def _sqlite(url: URL, *, create: bool) -> Engine:
    path = Path(url.database or "")
    if not path.exists():
        if not create:
            raise VaultError(
                f"the vault lacks {path}", hint="'virt-sse vault restore' makes the database from a backup"
            )
        # A file created by SQLite would be world-readable.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    return sqlite_engine(url, busy_seconds=_BUSY_TIMEOUT_SECONDS, pool_size=_SQLITE_CONNECTIONS)


def _migrate(connection: Connection) -> None:
    revision = revision_of(connection)
    if revision == SCHEMA:
        return
    serialise(connection, "schema")  # instances may open a new database at the same time
    if revision is not None and not sa.inspect(connection).has_table("sealed_secrets"):
        raise VaultError("the database belongs to another program, not to a vault")
    if connection.dialect.name == "sqlite" and revision is None:
        schema = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if schema not in _DEVELOPMENT_SCHEMAS:
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


class DatabaseRefusal(FailureRefusal):
    """503: the database failed."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "The vault cannot read or write its database now.", f"the vault's database failed: {why}"
        )
