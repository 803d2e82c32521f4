from __future__ import annotations

import hashlib
import hmac
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from support.audit_logs import MOMENT, fill, is_whole, make, open_log, read
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import GENESIS, AuditRecord, Component, Position, Result, process_actor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return open_log(tmp_path)


@pytest.fixture
def filled(log: AuditLog) -> AuditLog:
    return fill(log)


def test_an_appended_record_is_read_back(log: AuditLog) -> None:
    plain = AuditRecord(
        component=Component.VAULT,
        actor="5a0c",
        action="get",
        key="https://vault/keys/k",
        source="192.0.2.1",
        result=Result.REQUESTED,
        correlation=uuid4(),
        time=MOMENT,
    )
    strange = make(1, result=Result.REFUSED, reason='a\nb\0 "ü€" \udcff \u2028 {"hash":"' + "0" * 64 + '"}')
    for record in (plain, strange):
        log.append(record)
    assert [entry.record for entry in log.records()] == [plain, strange]
    assert [entry.seq for entry in log.records()] == [1, 2]
    assert len(read(log)) == 2
    assert is_whole(log)


def test_times_are_in_utc_and_milliseconds(log: AuditLog) -> None:
    before = datetime.now(UTC)
    record = AuditRecord(
        component=Component.HOST,
        actor="a",
        action="wrap",
        key="p:k",
        source="s",
        result=Result.ALLOWED,
        correlation=uuid4(),
    )
    log.append(record)
    [entry] = log.records()
    assert before - timedelta(milliseconds=1) < entry.time <= datetime.now(UTC)
    assert entry.as_json()["time"] == record.time.isoformat(timespec="milliseconds")


def test_long_texts_are_cut_off(log: AuditLog) -> None:
    log.append(make(reason="x" * 1_000_000))
    [entry] = log.records()
    assert entry.document["reason"] == "x" * 2000 + "…"


def test_lines_are_json_and_the_chain_needs_none_of_our_code(filled: AuditLog, tmp_path: Path) -> None:
    key = (tmp_path / "state/audit.key").read_bytes()
    previous = "0" * 64
    for number, line in enumerate(read(filled), start=1):
        fields = json.loads(line)
        assert (fields["format"], fields["seq"], fields["previous"]) == (1, number, previous)
        previous = hashlib.sha256(line[: line.rindex(b',"hash":')]).hexdigest()
        assert fields["hash"] == previous
        mac = hmac.digest(key, f"record {number}:{previous}".encode(), "sha256").hex()
        assert fields["mac"] == mac
    assert filled.verify().newest == Position(7, previous)


def test_all_files_are_private_and_the_key_lies_apart(log: AuditLog, folder: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for number in range(4):
            log.append(make(number))
    finally:
        os.umask(before)
    assert {path.name for path in folder.iterdir()} == {"audit-0001.jsonl", "audit.jsonl", "audit.head"}
    for path in (*folder.iterdir(), tmp_path / "state/audit.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (folder, tmp_path / "state"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_reading_an_empty_log_creates_no_file(log: AuditLog, folder: Path) -> None:
    assert log.verify().newest == GENESIS
    assert is_whole(log)
    assert [*log.records(), *log.tail(5)] == []
    assert not folder.exists()


def test_records_are_filtered_by_every_condition(log: AuditLog) -> None:
    records = [make(number, result=list(Result)[number % 3]) for number in range(9)]
    for record in records:
        log.append(record)

    def found(**filters: object) -> list[int]:
        return [entry.seq for entry in log.records(**filters)]  # type: ignore[arg-type] -- any of them

    assert found() == list(range(1, 10))
    assert found(result=Result.REFUSED) == [3, 6, 9]
    assert found(since=MOMENT + timedelta(seconds=6)) == [7, 8, 9]
    assert found(since=MOMENT + timedelta(seconds=6), result=Result.REFUSED) == [9]
    assert found(disk=UUID(int=4)) == [4]
    assert found(correlation=records[4].correlation) == [5]
    for key in ("platform-managed:default", "platform-managed:default:7f", "platform-managed:default/7f"):
        assert len(found(key=key)) == 9
    assert found(key="platform-managed") == found(key="platform-managed:default:7e") == []


def test_the_tail_goes_back_into_older_files_and_follows(filled: AuditLog) -> None:
    assert [entry.seq for entry in filled.tail(5)] == [3, 4, 5, 6, 7]
    assert [entry.seq for entry in filled.tail(100)] == list(range(1, 8))
    following = filled.tail(1, follow=True)
    assert next(following).seq == 7
    for number in range(7, 30):  # several files at once
        filled.append(make(number))
    assert [next(following).seq for _ in range(23)] == list(range(8, 31))


def test_following_a_missing_log_begins_with_its_first_record(log: AuditLog) -> None:
    following = log.tail(1, follow=True)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, following)
        for number in range(5):
            log.append(make(number))
        assert first.result(timeout=10).seq in range(1, 6)


def test_the_actor_is_the_user_behind_sudo_and_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/virt-sse", "disk"])
    monkeypatch.setenv("SUDO_USER", "alice")
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert process_actor() == f"root(0),sudo:alice,virt-sse[{os.getpid()}]"
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    assert process_actor() == f"?(4000000000),virt-sse[{os.getpid()}]"
