"""The store's database connection; migrates the schema at first use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

from virt_sse.errors import StoreError, StoreReadOnlyError
from virt_sse.store.failures import failure
from virt_sse.store.ownership import refuse_marked
from virt_sse.store.schema import BUSY_TIMEOUT_SECONDS, SCHEMA
from virt_sse.system.files import PRIVATE_FILE, private_folder
from virt_sse.system.migrations import UnknownRevisionError, revision_of, upgrade
from virt_sse.system.postgresql import DRIVER, postgresql_engine, serialise
from virt_sse.system.sqlite import READ_ONLY, sqlite_engine

_DEVELOPMENT_SCHEMAS = ("0001", "0002")
_EXAMPLE = "e.g. postgresql+psycopg:///virt_sse?host=/run/postgresql, or sqlite:////FOLDER/store.sqlite"
_MIGRATIONS = Path(__file__).parent / "migrations"


def parsed_url(url: str) -> URL:
    """The parts of a store's URL. Errors never quote the URL, which may have a password.

    :raise StoreError: When *url* is malformed, or names another database than SQLite and PostgreSQL.
    """
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise StoreError("invalid URL of the store", hint=_EXAMPLE) from None
    if parsed.drivername not in ("sqlite", "postgresql", DRIVER):
        raise StoreError(f"a store cannot be in {parsed.drivername[:40]!r}", hint=_EXAMPLE)
    return parsed


def open_engine(url: str) -> Engine:
    """Connect to *url*, create a missing SQLite database, and migrate the schema.

    :raise StoreError: When the database cannot be opened, or a newer version has written the schema.
    """
    parsed = parsed_url(url)
    with opening(parsed) as engine:
        first_use = _first_use(parsed) if parsed.drivername == "sqlite" else contextlib.nullcontext()
        with first_use, engine.begin() as connection:
            _migrate(connection)
    return engine


def memory_engine(memory: sqlite3.Connection) -> Engine:
    """A new store in the memory of this process.

    :param memory: an empty database; the caller closes the connection.
    """
    engine = sqlite_engine(
        make_url("sqlite://"), busy_seconds=0, creator=lambda: memory, poolclass=sa.pool.StaticPool
    )
    with engine.begin() as connection:
        _migrate(connection)
    return engine


@contextlib.contextmanager
def opening(url: URL) -> Iterator[Engine]:
    """Connect to a database that may not be the store; an SQLite file may be missing.

    If the block fails, all connections are closed.

    :raise StoreError: When the database cannot be opened, or fails within the block.
    """
    try:
        engine = _engine(url)
        try:
            yield engine
        except BaseException:
            engine.dispose()
            raise
    except ImportError as exc:
        raise StoreError(
            "a store in PostgreSQL needs psycopg", hint="pip install 'virt-sse[postgresql]'"
        ) from exc
    except (sa.exc.SQLAlchemyError, OSError) as exc:
        raise failure(exc, "cannot open the store") from exc


def _engine(url: URL) -> Engine:
    if url.drivername != "sqlite":
        return postgresql_engine(url, busy_seconds=BUSY_TIMEOUT_SECONDS)
    path = Path(url.database or "")
    if not path.is_absolute():
        raise StoreError("the store's SQLite file needs an absolute path")
    private_folder(path.parent)
    return sqlite_engine(url, busy_seconds=BUSY_TIMEOUT_SECONDS)


@contextlib.contextmanager
def _first_use(url: URL) -> Iterator[None]:
    """Create the database file with mode 0600, and serialise processes until the schema is migrated.

    SQLite itself would create a world-readable file. The lock uses a separate file, because closing a
    descriptor of the database file would drop SQLite's locks.
    """
    path = Path(url.database or "")
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
        yield
    finally:
        os.close(descriptor)


def _migrate(connection: Connection) -> None:
    revision = revision_of(connection)
    refuse_marked(connection, revision)
    if revision != SCHEMA:
        serialise(connection, "schema")  # hosts may open a new database at the same time
    try:
        upgrade(connection, _MIGRATIONS, SCHEMA)
    except UnknownRevisionError as exc:
        current = revision_of(connection)
        if current in _DEVELOPMENT_SCHEMAS:
            raise StoreError(
                f"the store has schema {current}, of a development version before 0.1.0",
                hint=f"upgrade the store to schema {SCHEMA} with a later development version first",
            ) from exc
        raise StoreError(
            f"the store has schema {current}, unknown to this virt-sse",
            hint="a newer version has written the store",
        ) from exc


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A read-write transaction: on SQLite one at a time, on PostgreSQL with the isolation READ COMMITTED.

    A constraint or :func:`virt_sse.system.postgresql.serialise` must decide where concurrent transactions
    could both pass a check.

    :raise StoreError: When the database fails.
    """
    with named_errors(engine), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection for queries; each statement sees its own snapshot, and holds no lock afterwards.

    :raise StoreError: When the database fails.
    """
    with named_errors(engine), engine.connect() as connection:
        is_server = engine.dialect.name == "postgresql"
        yield connection.execution_options(**({"isolation_level": "AUTOCOMMIT"} if is_server else READ_ONLY))


@contextlib.contextmanager
def named_errors(engine: Engine) -> Iterator[None]:
    """Name the failures of the database.

    :raise StoreError: When the database fails.
    """
    try:
        yield
    except sa.exc.SQLAlchemyError as exc:
        error = failure(exc, "the store failed")
        if isinstance(error, StoreReadOnlyError):
            engine.dispose()  # after a failover, new connections may reach the new primary
        elif type(error) is StoreError and isinstance(exc, sa.exc.OperationalError | sa.exc.ProgrammingError):
            _refuse_moved(engine)
        raise error from None


def _refuse_moved(engine: Engine) -> None:
    """Name the cause of a failure if the store moved after this process had opened the store.

    :raise StoreMovedError: When the store has moved.
    """
    with contextlib.suppress(sa.exc.SQLAlchemyError), engine.connect() as connection:
        connection.execution_options(**READ_ONLY)
        refuse_marked(connection, revision_of(connection))
