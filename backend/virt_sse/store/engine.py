"""The store's database connection; migrates the schema at first use."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

from virt_sse.errors import StoreError
from virt_sse.store.schema import BUSY_TIMEOUT_SECONDS, SCHEMA
from virt_sse.system.files import PRIVATE_FILE, private_folder
from virt_sse.system.migrations import UnknownRevisionError, revision_of, upgrade
from virt_sse.system.sqlite import READ_ONLY, reason, sqlite_engine

_DEVELOPMENT_SCHEMAS = ("0001", "0002")
_MIGRATIONS = Path(__file__).parent / "migrations"


def open_engine(url: str) -> Engine:
    """Connect to *url*, create a missing SQLite database, and migrate the schema.

    :raise StoreError: When the database cannot be opened, or a newer version has written the schema.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _open_sqlite(parsed)
        engine = sa.create_engine(parsed)
        with engine.begin() as connection:
            _migrate(connection)
    except (sa.exc.SQLAlchemyError, OSError) as exc:
        raise StoreError(f"cannot open the store: {reason(exc)}") from exc
    return engine


def _open_sqlite(url: URL) -> Engine:
    path = Path(url.database or "")
    if not path.is_absolute():
        raise StoreError("the store's SQLite file needs an absolute path")
    private_folder(path.parent)
    engine = sqlite_engine(url, busy_seconds=BUSY_TIMEOUT_SECONDS)
    try:
        with _first_use(path), engine.begin() as connection:
            _migrate(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextlib.contextmanager
def _first_use(path: Path) -> Iterator[None]:
    """Create the database file with mode 0600, and serialise processes until the schema is migrated.

    SQLite itself would create a world-readable file. The lock uses a separate file, because closing a
    descriptor of the database file would drop SQLite's locks.
    """
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
        yield
    finally:
        os.close(descriptor)


def _migrate(connection: Connection) -> None:
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
    """A read-write transaction.

    :raise StoreError: When the database fails.
    """
    with _named_errors(), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read-only connection; each statement sees its own snapshot.

    :raise StoreError: When the database fails.
    """
    with _named_errors(), engine.connect() as connection:
        yield connection.execution_options(**READ_ONLY)


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as exc:
        raise StoreError(f"the store failed: {reason(exc)}") from None
