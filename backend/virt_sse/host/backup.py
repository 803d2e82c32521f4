"""Backup and restore of the store. A backup is a single SQLite file, also of a store in PostgreSQL."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import URL

from virt_sse.config import Config
from virt_sse.errors import AgentError, StoreError
from virt_sse.store.copying import dump, load
from virt_sse.store.engine import open_engine, parsed_url
from virt_sse.system.database_url import sqlite_url
from virt_sse.system.files import PRIVATE_FILE, private_folder, publish
from virt_sse.system.sqlite_backup import (
    candidate_path,
    copy_database,
    present_files,
    refuse_existing,
    remove_database,
    write_database,
)


def back_up_store(config: Config, file: Path) -> None:
    """Copy the store to *file*, an SQLite file, also while agents and other commands use the store.

    :param file: must not exist.
    :raise StoreError: When *file* exists, or a database or file cannot be read or written.
    """
    url, doing = parsed_url(config.store_url), f"back up the store to {file}"
    if path := _file(url):
        _copy(path, file, doing)
        return
    try:
        refuse_existing(file)
        with closing(sqlite3.connect(":memory:")) as memory:  # a killed command leaves no part of a copy
            dump(config.store_url, memory)
            write_database(memory, file)
    except OSError as exc:
        raise StoreError(f"cannot {doing}: {exc.strerror}") from exc


def restore_store(config: Config, file: Path) -> None:
    """Make the backup in *file* the store of a host that has none: no SQLite file, or no row in PostgreSQL.

    :raise StoreError: When the host has a store, or *file* is not a backup.
    :raise AgentError: When the agent runs.
    """
    url, doing = parsed_url(config.store_url), f"restore the store from {file}"
    path = _file(url)
    try:
        private_folder(config.state_directory)
        with without_agent(config):
            candidate = candidate_path(path or config.state_directory / "store")
            candidate.with_suffix(".lock").unlink(missing_ok=True)
            if path:
                _refuse_present(path)
            try:
                _copy(file, candidate, doing)
                _check(candidate, file)
                if path:
                    publish(candidate, path)
                else:
                    load(config.store_url, candidate)
            finally:
                remove_database(candidate)
                candidate.with_suffix(".lock").unlink(missing_ok=True)
    except OSError as exc:
        raise StoreError(f"cannot {doing}: {exc.strerror}") from exc


def _refuse_present(path: Path) -> None:
    private_folder(path.parent)
    present = present_files(path)
    if present:
        raise StoreError(
            f"the host has a store: {', '.join(str(each) for each in present)}",
            hint="move all of these files away first",
        )


def _file(url: URL) -> Path | None:
    """The file of a store in SQLite."""
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database:
        raise StoreError("the store's SQLite file needs an absolute path")
    return Path(url.database)


@contextlib.contextmanager
def without_agent(config: Config) -> Iterator[None]:
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
    with closing(sqlite3.connect(candidate)) as connection:
        names = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
    if not {"alembic_version", "disks"} <= names:
        raise StoreError(f"{file} is not a backup of a store")
    open_engine(sqlite_url(candidate)).dispose()


def _copy(source: Path, target: Path, doing: str) -> None:
    try:
        copy_database(source, target)
    except OSError as exc:
        raise StoreError(f"cannot {doing}: {exc.strerror}") from exc
    except sqlite3.Error as exc:
        raise StoreError(f"cannot {doing}: {exc}") from exc
