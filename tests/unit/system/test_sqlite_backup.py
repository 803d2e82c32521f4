from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from virt_sse.system.sqlite_backup import copy_database


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"CREATE TABLE disks", b"CREATE TABLE \xff\xff\xff\xff\xff"),
        (b"CREATE TABLE disks", b"CREATE \xff\xff\xff\xff\xff\xffdisks"),
        (b"SQLite format 3", b"SQLite format 4"),
    ],
)
def test_a_damaged_database_is_not_copied(tmp_path: Path, old: bytes, new: bytes) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with closing(sqlite3.connect(source)) as connection:
        connection.execute("CREATE TABLE disks (id TEXT)")
    content = source.read_bytes()
    assert old in content
    source.write_bytes(content.replace(old, new))
    with pytest.raises(sqlite3.DatabaseError):
        copy_database(source, target)
    assert list(tmp_path.iterdir()) == [source]
