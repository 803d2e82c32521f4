from __future__ import annotations

import signal
import threading
import uuid
from pathlib import Path

import pytest

from support.forking import Report, fork
from virt_sse.errors import DiskInUseError, StoreError
from virt_sse.system.locks import DiskLocks, is_locked

DISK, OTHER = uuid.uuid4(), uuid.uuid4()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/locks"


def test_a_disk_is_held_by_one_holder_at_a_time(path: Path) -> None:
    locks, others = DiskLocks(path), DiskLocks(path)
    with locks.hold(DISK):
        with pytest.raises(DiskInUseError), others.hold(DISK):
            pass
        with others.hold(OTHER):
            pass
        with pytest.raises(DiskInUseError), locks.hold(DISK):
            pass
    with others.hold(DISK):
        pass


def test_threads_exclude_each_other(path: Path) -> None:
    locks = DiskLocks(path)
    refused = []

    def attempt() -> None:
        try:
            with locks.hold(DISK):
                pass
        except DiskInUseError as exc:
            refused.append(exc)

    with locks.hold(DISK):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_a_lock_dies_with_its_process(path: Path) -> None:
    def hold(report: Report) -> None:
        with DiskLocks(path).hold(DISK):
            report("held")
            signal.pause()

    child = fork(hold)
    assert child.line() == "held"
    with pytest.raises(DiskInUseError), DiskLocks(path).hold(DISK):
        pass
    child.kill()
    with DiskLocks(path).hold(DISK):
        pass


def test_the_file_is_ours_alone_and_stays_empty(path: Path) -> None:
    with DiskLocks(path).hold(DISK):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == 0


def test_a_lock_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file/locks", tmp_path):
        with pytest.raises(StoreError, match="cannot open"), DiskLocks(path).hold(DISK):
            pass


def test_a_lock_of_another_holder_is_seen(path: Path) -> None:
    with DiskLocks(path).hold(DISK), path.open("rb") as file:
        assert is_locked(file.fileno(), 0, 1 << 62)
    with path.open("rb") as file:
        assert not is_locked(file.fileno(), 0, 1 << 62)
