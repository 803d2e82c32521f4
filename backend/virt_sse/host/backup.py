"""Backup and restore of this host's store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from virt_sse.config import Config
from virt_sse.errors import AgentError, StoreError
from virt_sse.store.engine import open_engine
from virt_sse.system.files import PRIVATE_FILE, private_folder, publish
from virt_sse.system.sqlite_backup import candidate_path, copy_database, present_files, remove_database


def back_up_store(config: Config, file: Path) -> None:
    """Copy the store to *file*, also while the agent and other commands use the store.

    :param file: must not exist.
    :raise StoreError: When the store is not an SQLite file, *file* exists, or a file cannot be read or
        written.
    """
    _copy(_database(config), file, f"back up the store to {file}")


def restore_store(config: Config, file: Path) -> None:
    """Make the backup in *file* the store of a host that has none.

    :raise StoreError: When the store is not an SQLite file, exists already, or *file* is not a backup.
    :raise AgentError: When the agent runs.
    """
    database, doing = _database(config), f"restore the store from {file}"
    try:
        private_folder(database.parent)
        with _without_agent(config):
            candidate = candidate_path(database)
            candidate.with_suffix(".lock").unlink(missing_ok=True)
            present = present_files(database)
            if present:
                raise StoreError(
                    f"the host has a store: {', '.join(str(path) for path in present)}",
                    hint="move all of these files away first",
                )
            try:
                _copy(file, candidate, doing)
                _check(candidate, file)
                publish(candidate, database)
            finally:
                remove_database(candidate)
                candidate.with_suffix(".lock").unlink(missing_ok=True)
    except OSError as exc:
        raise StoreError(f"cannot {doing}: {exc.strerror}") from exc


def _database(config: Config) -> Path:
    try:
        url = make_url(config.store_url)
    except sa.exc.ArgumentError as exc:
        raise StoreError("invalid URL of the store") from exc
    if url.get_backend_name() != "sqlite" or not url.database:
        raise StoreError(
            "the store is not an SQLite file", hint="use the database server's own tools, e.g. pg_dump"
        )
    return Path(url.database)


@contextlib.contextmanager
def _without_agent(config: Config) -> Iterator[None]:
    """Keep an agent from starting: it would write into the file moved away."""
    path = config.agent_socket.with_suffix(".lock")
    private_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AgentError("the agent of this host is running", hint="stop the agent first") from exc
        yield
    finally:
        os.close(descriptor)


def _check(candidate: Path, file: Path) -> None:
    """Check that the copy is a store, and upgrade its schema if necessary."""
    with contextlib.closing(sqlite3.connect(candidate)) as connection:
        names = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
    if not {"alembic_version", "disks"} <= names:
        raise StoreError(f"{file} is not a backup of a store")
    open_engine(URL.create("sqlite", database=str(candidate)).render_as_string(hide_password=False)).dispose()


def _copy(source: Path, target: Path, doing: str) -> None:
    try:
        copy_database(source, target)
    except OSError as exc:
        raise StoreError(f"cannot {doing}: {exc.strerror}") from exc
    except sqlite3.Error as exc:
        raise StoreError(f"cannot {doing}: {exc}") from exc
