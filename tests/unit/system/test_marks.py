from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from virt_sse.system.marks import Marks

FIRST, SECOND = uuid.UUID(int=1), uuid.UUID(int=2)


def test_marks_are_private_and_found_by_another_process(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks")
    assert marks.all() == []
    for each in (SECOND, FIRST, FIRST):
        marks.add(each)
    (tmp_path / "marks/other").touch()
    assert Marks(tmp_path / "marks").all() == [FIRST, SECOND]
    assert marks.folder.stat().st_mode & 0o777 == 0o700
    assert (marks.folder / str(FIRST)).stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        marks.remove(FIRST)
    assert marks.all() == [SECOND]


def test_a_mark_follows_no_link(tmp_path: Path) -> None:
    marks = Marks(tmp_path)
    (tmp_path / str(FIRST)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        marks.add(FIRST)
    assert not (tmp_path / "elsewhere").exists()
