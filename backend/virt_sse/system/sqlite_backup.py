"""Copies of SQLite databases, made with SQLite's backup API while other processes use the database.

A plain copy of a database in WAL mode lacks the newest transactions, or mixes old and new pages. The copy
is made in memory: a killed process leaves no part of a copy, which no later command would find.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from virt_sse.system.files import write_new

_BUSY_SECONDS = 30
_JOURNAL_VERSIONS = slice(18, 20)
"""Read and write version in the header (SQLite's database file format, §1.3.4)."""
_NO_WAL = b"\1\1"
_SIDE_FILES = ("-wal", "-shm", "-journal")


def copy_database(source: Path, target: Path) -> None:
    """Copy a database into a new file, mode 0600: a single file, complete and durable, or no file.

    :param target: must not exist; the folder must exist.
    :raise FileExistsError: When *target* exists; the file is left alone.
    :raise OSError: When a file cannot be read or written.
    :raise sqlite3.Error: When *source* is not an SQLite database, is damaged, or stays locked.
    """
    source.stat()
    refuse_existing(target)
    try:
        with closing(_connect(source)) as read, closing(sqlite3.connect(":memory:")) as copied:
            read.backup(copied)
            found = copied.execute("PRAGMA integrity_check(1)").fetchall()
            if found != [("ok",)]:
                raise sqlite3.DatabaseError(f"the database is damaged: {found[0][0]}")
            write_database(copied, target)
    except UnicodeDecodeError as exc:  # by sqlite3, from SQLite's message with a damaged name
        raise sqlite3.DatabaseError("the database is damaged") from exc


def refuse_existing(target: Path) -> None:
    """Refuse a path that is taken.

    :raise FileExistsError: When *target* exists.
    """
    if target.is_symlink() or target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def write_database(database: sqlite3.Connection, target: Path) -> None:
    """Write a database in memory into the new file *target*, mode 0600, complete and durable.

    :raise OSError: When the file exists, or cannot be written.
    """
    content = bytearray(database.serialize())
    content[_JOURNAL_VERSIONS] = _NO_WAL  # else a reader needs a writable folder
    write_new(target, bytes(content))


def candidate_path(path: Path) -> Path:
    """The hidden path, beside *path*, of a database that is checked before it is restored.

    The caller holds a lock. A file of a killed restore is removed.
    """
    candidate = path.with_name(f".{path.name}.restoring")
    remove_database(candidate)
    return candidate


def present_files(path: Path) -> list[Path]:
    """List the existing files of the database at *path*: a stale WAL file would corrupt a restored one."""
    candidates = [path, *(path.with_name(path.name + suffix) for suffix in _SIDE_FILES)]
    return [each for each in candidates if each.is_symlink() or each.exists()]


def remove_database(path: Path) -> None:
    """Remove a temporary database with its side files."""
    for each in present_files(path):
        each.unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS, isolation_level=None
    )
