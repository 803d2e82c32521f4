"""Kills, full disks, and many writers at once."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import virt_sse.audit.log
import virt_sse.audit.record
import virt_sse.system.files
from support.audit_logs import fill, is_whole, make, open_log, read
from support.faults import STEP, dies_at, no_file_beyond, some
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import GENESIS, TORN_RECORD, seal
from virt_sse.errors import AuditError

WRITERS = (virt_sse.audit.log, virt_sse.audit.record, virt_sse.system.files)


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return open_log(tmp_path)


def actions(log: AuditLog) -> list[str | None]:
    return [entry.document["action"] for entry in log.records()]


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_a_kill_anywhere_in_an_append_leaves_the_log_whole(
    log: AuditLog, tmp_path: Path, before: int
) -> None:
    """In a new log, within a file, and when a file is full."""
    for number in range(before):
        log.append(make(number))
    (tmp_path / "log").mkdir(exist_ok=True)
    (tmp_path / "state").mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "log", tmp_path / "before/log")
    shutil.copytree(tmp_path / "state", tmp_path / "before/state")
    line, outcomes = before % STEP - STEP + 1, set()
    killed = True
    while killed:
        line += STEP
        for name in ("log", "state"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(tmp_path / "before" / name, tmp_path / name)
        killed = dies_at(line, WRITERS, lambda: open_log(tmp_path).append(make(100)))
        there = len(read(log)) - before
        outcomes.add((killed, there))
        assert is_whole(log)
        assert log.append(make(200)) == before + there + 1
        report = log.verify()
        assert (report.broken, report.beyond_head) == (None, 0)
        assert set(actions(log)) == {"unwrap"}
        assert not [path for path in (tmp_path / "log").iterdir() if path.name.startswith(".")]
    assert outcomes == {(True, 0), (True, 1), (False, 1)}


def torn(log: AuditLog, size: int) -> bytes:
    """Leave the first *size* bytes of one more record, as a writer that is killed does; those bytes."""
    lines = read(log)
    *_, newest = log.tail(1)
    line, _ = seal(make(8).as_json(), newest.position, log._key_path.read_bytes())
    with log.path.open("ab") as file:
        file.write(line[:size])
    assert len(read(log)) == len(lines) + 1
    return line[:size]


@pytest.mark.slow
def test_a_torn_record_is_recovered_wherever_it_ends(tmp_path: Path) -> None:
    before = fill(open_log(tmp_path / "before"))
    *_, newest = before.tail(1)
    length = len(seal(make(8).as_json(), newest.position, bytes(32))[0])
    for size in {*some(range(1, length + 1), most=60), length - 1}:
        shutil.copytree(tmp_path / "before", tmp_path / str(size))
        log = open_log(tmp_path / str(size))
        fragment = torn(log, size)
        report = log.verify()
        is_all = size >= length - 1  # but for its newline
        assert (report.broken, report.torn, report.beyond_head) == (None, not is_all, int(is_all))
        log.append(make(9))
        report = log.verify()
        assert (report.broken, report.torn, report.newest.seq) == (None, False, 9)
        recovered = next(log.tail(2))
        if is_all:
            assert recovered.record.disk == make(8).disk
        else:
            assert recovered.document["action"] == TORN_RECORD
            assert recovered.document["reason"] == fragment.decode()
        assert all(line.startswith(b"{") and line.endswith(b"}\n") for line in read(log))


@pytest.mark.slow
def test_a_kill_anywhere_in_a_recovery_loses_no_evidence(log: AuditLog, tmp_path: Path) -> None:
    fill(log)
    fragment = torn(log, 300)
    shutil.copytree(tmp_path / "log", tmp_path / "before")
    line, killed = 1 - STEP, True
    while killed:
        line += STEP
        shutil.rmtree(tmp_path / "log")
        shutil.copytree(tmp_path / "before", tmp_path / "log")
        killed = dies_at(line, WRITERS, lambda: open_log(tmp_path).append(make(100)))
        log.append(make(200))
        assert is_whole(log)
        assert [
            entry.document["reason"] for entry in log.records() if entry.document["action"] == TORN_RECORD
        ] == [fragment.decode()]


@pytest.mark.parametrize("has_torn", [False, True])
def test_on_a_full_disk_nothing_is_left_of_a_record(log: AuditLog, *, has_torn: bool) -> None:
    fill(log)
    if has_torn:
        torn(log, 200)
    content = log.path.read_bytes()
    for room in (0, 1, 100, 300, 500):
        with no_file_beyond(len(content) + room), pytest.raises(AuditError, match="File too large") as caught:
            log.append(make())
        assert caught.value.hint == "a key use that cannot be recorded is refused"
        assert log.path.read_bytes() == content
        assert is_whole(log)
    log.append(make())
    assert is_whole(log)
    assert log.verify().newest.seq == (9 if has_torn else 8)


def test_without_room_for_its_first_files_no_log_begins(log: AuditLog) -> None:
    for room in (0, 20, 100, 400):
        with no_file_beyond(room), pytest.raises(AuditError, match="File too large"):
            log.append(make())
    assert log.append(make()) == 1
    assert is_whole(log)


def test_a_log_that_cannot_be_written_or_read_is_an_error(log: AuditLog, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(AuditError, match="cannot write the audit log"):
        log.append(make())
    (tmp_path / "log").unlink()
    log.append(make())
    (tmp_path / "state/audit.key").write_bytes(bytes(31))
    for use in (lambda: log.append(make()), log.verify):
        with pytest.raises(AuditError, match="holds 31 bytes instead of 32"):
            use()
    (tmp_path / "state/audit.key").unlink()
    log.path.unlink()
    log.path.symlink_to("elsewhere")
    with pytest.raises(AuditError, match="symbolic links"):
        log.append(make())
    assert not (tmp_path / "log/elsewhere").exists()
    log.path.unlink()
    log.path.mkdir()
    for use in (log.verify, lambda: list(log.records()), lambda: list(log.tail(1))):
        with pytest.raises(AuditError, match="cannot read the audit log"):
            use()


@pytest.mark.slow
def test_processes_and_threads_append_at_once_to_one_chain(tmp_path: Path) -> None:
    script = (
        "import sys, uuid, pathlib; from virt_sse.audit.log import AuditLog\n"
        "from virt_sse.audit.record import AuditRecord, Component, Result\n"
        "log = AuditLog(pathlib.Path(sys.argv[1]), roll_size=40_000)\n"
        "for number in range(200):\n"
        "    log.append(AuditRecord(component=Component.HOST, actor=sys.argv[2], action='wrap', key='p:k',\n"
        "        source=str(number), result=Result.ALLOWED, correlation=uuid.uuid4()))\n"
    )
    log = AuditLog(tmp_path / "audit.jsonl", roll_size=40_000)
    processes = [
        subprocess.Popen([sys.executable, "-c", script, log.path, f"process-{number}"]) for number in range(8)
    ]
    with ThreadPoolExecutor(3) as pool:
        following = pool.submit(
            lambda: [entry.seq for entry in itertools.islice(log.tail(1, follow=True), 400)]
        )
        for future in [pool.submit(lambda: [log.append(make(n)) for n in range(200)]) for _ in range(2)]:
            future.result(timeout=60)
        while any(process.poll() is None for process in processes):
            assert is_whole(log)
        seen = following.result(timeout=60)
    assert [process.wait(60) for process in processes] == [0] * 8
    assert seen == list(range(seen[0], seen[0] + 400))

    entries = list(log.records())
    assert [entry.seq for entry in entries] == list(range(1, 2001))
    assert set(Counter(entry.document["actor"] for entry in entries).values()) == {200, 400}
    for number in range(8):
        mine = [e.document["source"] for e in entries if e.document["actor"] == f"process-{number}"]
        assert mine == [str(n) for n in range(200)]
    report = log.verify()
    assert (report.broken, report.newest.seq, report.beyond_head) == (None, 2000, 0)
    assert len(log.files()) > 10
    assert all(path.stat().st_size < 42_000 for path in log.files())


def test_reading_takes_memory_independent_of_the_length(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(make())
    key = (tmp_path / "audit.key").read_bytes()
    peaks = []
    for count in (1_000, 10_000):
        position = GENESIS
        with log.path.open("wb") as file:
            for number in range(count):
                line, position = seal(make(number).as_json(), position, key)
                file.write(line)
        tracemalloc.start()
        try:
            log.verify()
            assert sum(1 for _ in log.records()) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 500_000
