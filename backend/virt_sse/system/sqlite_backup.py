"""Copies of SQLite databases, made with SQLite's backup API while other processes use the database.

A plain copy of a database in WAL mode lacks the newest transactions, or mixes old and new pages.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path

from virt_sse.system.files import PRIVATE_FILE, publish

_BUSY_SECONDS = 30
_SIDE_FILES = ("-wal", "-shm", "-journal")


def copy_database(source: Path, target: Path) -> None:
    """Copy a database into a new file, mode 0600: a single file, complete and durable, or no file.

    :param target: must not exist; the folder must exist.
    :raise FileExistsError: When *target* exists; the file is left alone.
    :raise OSError: When a file cannot be read or written.
    :raise sqlite3.Error: When *source* is not an SQLite database, is damaged, or stays locked.
    """
    source.stat()
    if target.is_symlink() or target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    temporary = temporary_name(target)
    os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
    try:
        with closing(_connect(source, "ro")) as read, closing(_connect(temporary, "rw")) as written:
            read.backup(written)
            written.execute("PRAGMA journal_mode=DELETE").close()  # else a reader needs a writable folder
            found = written.execute("PRAGMA integrity_check(1)").fetchall()
            if found != [("ok",)]:
                raise sqlite3.DatabaseError(f"the database is damaged: {found[0][0]}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        publish(temporary, target)
    except UnicodeDecodeError as exc:  # by sqlite3, from SQLite's message with a damaged name
        raise sqlite3.DatabaseError("the database is damaged") from exc
    finally:
        remove_database(temporary)


def temporary_name(path: Path) -> Path:
    """Make a hidden name, unique to the caller, beside *path*."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def present_files(path: Path) -> list[Path]:
    """List the existing files of the database at *path*: a stale WAL file would corrupt a restored one."""
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in _SIDE_FILES)]
    return [each for each in candidates if each.is_symlink() or each.exists()]


def remove_database(path: Path) -> None:
    """Remove a temporary database with its side files."""
    for each in present_files(path):
        each.unlink(missing_ok=True)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
    )
