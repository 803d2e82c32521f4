"""What was done to a log by others, and is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.audit_logs import broken, fill, is_whole, make, open_log, read
from support.faults import some
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import GENESIS, LOST_HEAD, Position, record_mac, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def filled(tmp_path: Path) -> AuditLog:
    return fill(open_log(tmp_path))


def places(log: AuditLog) -> Iterator[tuple[Path, list[bytes], int]]:
    """Each line of the log: its file, that file's lines, and its index among them."""
    for path in log.files():
        lines = path.read_bytes().splitlines(keepends=True)
        for index in range(len(lines)):
            yield path, list(lines), index


def test_a_removed_line_is_found(filled: AuditLog) -> None:
    for seq, (path, lines, index) in enumerate(list(places(filled)), start=1):
        content = path.read_bytes()
        path.write_bytes(b"".join(lines[:index] + lines[index + 1 :]))
        name, line, missing, reason = broken(filled)
        assert (missing, reason) == (seq, f"record {seq} is missing")
        is_last = index == len(lines) - 1 and path != filled.path
        assert line == 1 if is_last else (name, line) == (path.name, index + 1)
        path.write_bytes(content)
    assert is_whole(filled)


@pytest.mark.slow
def test_a_flipped_bit_is_found_wherever_it_is(filled: AuditLog) -> None:
    for seq, (path, lines, index) in enumerate(list(places(filled)), start=1):
        content = path.read_bytes()
        start = len(b"".join(lines[:index]))
        for offset in some(range(start, start + len(lines[index])), most=60):
            altered = bytearray(content)
            altered[offset] ^= 1 << offset % 8
            path.write_bytes(altered)
            name, line, found, _ = broken(filled)
            assert (name, found) == (path.name, seq)
            assert line in (index + 1, index + 2)  # a line that was cut in two
        path.write_bytes(content)
    assert is_whole(filled)


def test_lines_that_were_moved_copied_or_swapped_are_found(filled: AuditLog) -> None:
    for path, lines, index in list(places(filled)):
        content = path.read_bytes()
        for changed in (
            [*lines[:index], lines[index], *lines[index:]],
            [lines[index], *lines[:index], *lines[index + 1 :]] if index else lines[::-1],
        ):
            if changed != lines:
                path.write_bytes(b"".join(changed))
                assert not is_whole(filled)
        path.write_bytes(content)
    assert is_whole(filled)


def test_files_that_are_missing_or_swapped_are_found(filled: AuditLog, tmp_path: Path) -> None:
    first, second, newest = filled.files()
    for path, place, reason in (
        (first, ("audit-0002.jsonl", 1, 1), "records 1 to 3 are missing"),
        (second, ("audit.jsonl", 1, 4), "records 4 to 6 are missing"),
        (newest, ("audit.jsonl", 1, 7), "record 7 is missing"),
    ):
        path.rename(tmp_path / "away")
        assert broken(filled) == (*place, reason)
        (tmp_path / "away").rename(path)
    first.rename(tmp_path / "away")
    second.rename(first)
    (tmp_path / "away").rename(second)
    assert broken(filled) == ("audit-0001.jsonl", 1, 1, "records 1 to 3 are missing")


def rewrite(log: AuditLog, change: int, key: bytes) -> Position:
    """Alter a record, and compute all that depends on it anew, with *key*."""
    position, lines = GENESIS, b""
    for entry in list(log.records()):
        fields: dict[str, object] = dict(entry.document)
        if entry.seq == change:
            fields["actor"] = "nobody"
        line, position = seal(fields, position, key)
        lines += line
    for path in log.files()[:-1]:
        path.unlink()
    log.path.write_bytes(lines)
    return position


def test_hashes_that_were_computed_anew_are_found(filled: AuditLog, folder: Path, tmp_path: Path) -> None:
    newest = rewrite(filled, 5, bytes(32))
    assert broken(filled) == ("audit.jsonl", 1, 1, "the record was not written with this log's key")
    copy = AuditLog(filled.path)  # without the key: just by the head
    assert broken(copy) == ("audit.jsonl", 7, 7, "record 7 differs from the record that was written")
    assert not copy.verify().authentic

    rewrite(filled, 5, (tmp_path / "state/audit.key").read_bytes())  # by root
    assert broken(filled) == ("audit.jsonl", 7, 7, "record 7 differs from the record that was written")
    head = (folder / "audit.head").read_text().split()
    (folder / "audit.head").write_text(f"{head[0]} {newest.hash} {head[2]}\n")
    assert broken(filled)[0] == "audit.head"


def test_the_head_cannot_be_made_from_a_record(filled: AuditLog, folder: Path) -> None:
    lines = read(filled)
    third = json.loads(lines[2])
    (folder / "audit-0002.jsonl").unlink()
    filled.path.unlink()
    (folder / "audit.head").write_text(f"{3:020} {third['hash']} {third['mac']}\n")
    assert broken(filled) == ("audit.head", 1, 4, "the log's head is missing or invalid")


def test_an_end_that_was_cut_off_is_found_and_stays_so(filled: AuditLog, tmp_path: Path) -> None:
    content = filled.path.read_bytes()
    for size in range(len(content) - 1):
        filled.path.write_bytes(content[:size])
        assert broken(filled)[2:] == (7, "record 7 is missing")
        if not size % 50:
            copy = AuditLog(tmp_path / f"{size}/audit.jsonl", key=tmp_path / "state/audit.key")
            shutil.copytree(filled.path.parent, copy.path.parent)
            for _ in range(3):
                copy.append(make())
            assert broken(copy)[2:] == (7, "record 7 is missing")
            assert copy.verify().newest.seq == 6


def test_an_older_state_is_found_by_an_anchor(filled: AuditLog, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "older")
    filled.append(make())
    anchor = filled.verify().newest
    assert filled.verify(anchor).broken is None
    assert filled.verify(Position(2, json.loads(read(filled)[1])["hash"])).broken is None
    wrong = filled.verify(Position(2, "0" * 64)).broken
    assert wrong
    assert str(wrong).endswith("audit-0001.jsonl, line 2: record 2 differs from the record that was written")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "older", folder)
    assert is_whole(filled)
    found = filled.verify(anchor).broken
    assert found
    assert found.reason == "record 8 is missing"


@pytest.mark.parametrize("damage", ["gone", "empty", "zeros", "other"])
def test_a_head_that_was_lost_is_found_and_stays_so(filled: AuditLog, folder: Path, damage: str) -> None:
    head = folder / "audit.head"
    content = head.read_bytes()
    if damage == "gone":
        head.unlink()
    else:
        head.write_bytes({"empty": b"", "zeros": bytes(151), "other": b"1" + content[1:]}[damage])
    assert broken(filled) == ("audit.head", 1, 8, "the log's head is missing or invalid")
    assert filled.append(make()) == 9
    assert head.stat().st_size == len(content)
    note, newest = filled.tail(2)
    assert (note.document["action"], newest.document["action"]) == (LOST_HEAD, "unwrap")
    assert broken(filled)[2] == 8
    assert "head was lost" in broken(filled)[3]


def test_a_log_that_was_lost_is_found_and_stays_so(filled: AuditLog, folder: Path) -> None:
    shutil.rmtree(folder)
    assert broken(filled)[2:] == (1, "the log's head is missing or invalid")
    assert filled.append(make()) == 2
    assert broken(filled)[2] == 1


def test_a_lost_key_is_found_and_keys_go_on_being_used(filled: AuditLog, tmp_path: Path) -> None:
    (tmp_path / "state/audit.key").unlink()
    assert not filled.verify().authentic
    filled.append(make())
    assert broken(filled)[2:] == (1, "the record was not written with this log's key")


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"\0" * 600, b"[" * 100_000, b"x" * 3_000_000, b'{"format":2}', b"\xff\xfe"],
    ids=lambda line: f"{line[:12]!r}-{len(line)}",
)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_line_that_is_no_record_is_found(
    filled: AuditLog, tmp_path: Path, line: bytes, *, sealed: bool
) -> None:
    if sealed:
        position = Position(1, hashlib.sha256(line).hexdigest())
        mac = record_mac((tmp_path / "state/audit.key").read_bytes(), position)
        line += f',"hash":"{position.hash}","mac":"{mac}"}}'.encode()
    first = filled.files()[0]
    first.write_bytes(line + b"\n" + first.read_bytes())
    assert broken(filled)[:3] == ("audit-0001.jsonl", 1, 1)
    assert broken(filled)[3].startswith("not a record")
    assert [entry.seq for entry in filled.records()][-7:] == list(range(1, 8))


@pytest.mark.parametrize(
    "forged",
    [
        {"time": None},
        {"time": "yesterday"},
        {"time": "2026-01-31T12:30:15"},
        {"time": "0001-01-01T00:00+23:59"},
        {"time": "9999-12-31T23:59-23:59"},
        {"time": 5},
        {"time": ["2026-01-31T12:30:15+00:00"]},
        {"key": 5},
        {"disk": {"a": 1}},
        {"actor": True},
        {"reason": ["x"]},
        {"seq": True},
    ],
    ids=str,
)
def test_a_forged_line_with_odd_fields_is_no_record(folder: Path, forged: dict[str, object]) -> None:
    """Everyone can compute the hash of a line; the MAC is checked by ``verify`` alone."""
    log = AuditLog(folder / "audit.jsonl")
    log.append(make())
    line, _ = seal({**make(1).as_json(), **forged}, Position(1, "0" * 64), bytes(32))
    with log.path.open("ab") as file:
        file.write(line)
    entries = list(log.records(since=make().time, key="no:key"))
    entries += log.records(since=make().time)
    assert [entry.seq for entry in entries] == [1]
    assert [entry.seq for entry in log.tail(10)] == [1]
    assert not is_whole(log)
