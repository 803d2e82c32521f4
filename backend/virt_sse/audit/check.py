"""Verification of an audit log."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from virt_sse.audit.record import GENESIS, LOST_HEAD, AuditEntry, Position, record_mac


class Line(NamedTuple):
    """A line of the log and its position.

    :ivar number: line number within its file, from 1.
    :ivar text: ends with a newline, unless the file ends earlier or the line is far too long.
    """

    path: Path
    number: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Break:
    """The first place where a log differs from the written records.

    :ivar seq: number of the record expected there.
    """

    path: Path
    line: int
    seq: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of a verification.

    :ivar newest: the last valid record, before the break if any; its number is the count of valid records.
    :ivar authentic: whether the MACs were checked, too, with the log's key; ``None`` for an empty log.
    :ivar beyond_head: number of records newer than the head: records being written, or written before a kill.
    :ivar torn: whether the log ends with a torn record; the next writer repairs the end.
    :ivar broken: ``None`` when the log is intact.
    """

    newest: Position
    authentic: bool | None
    beyond_head: int
    torn: bool
    broken: Break | None


def check(
    path: Path, lines: Iterable[Line], *, head: Position, anchor: Position | None, key: bytes | None
) -> VerifyReport:
    """Follow the chain through all *lines*, oldest first.

    :param path: file of the newest records.
    :param anchor: position of a record known to have been in the log.
    :param key: if given, the MACs are checked, too.
    """
    newest, last, torn = GENESIS, Line(path, 0, b""), False
    known = [head, *([anchor] if anchor else [])]

    def report(broken: str | None = None) -> VerifyReport:
        place = Break(last.path, last.number, newest.seq + 1, broken) if broken else None
        authentic = key is not None if newest.seq else None
        return VerifyReport(newest, authentic, max(0, newest.seq - head.seq), torn, place)

    for line in lines:
        if torn:
            return report("not a record")
        last = line
        try:
            newest = _follow(newest, line, known, key)
        except ValueError as exc:
            if line.text.endswith(b"\n"):
                return report(str(exc))
            torn = True  # valid only for the last line
    if (seq := max(known).seq) > newest.seq:
        if last.path != path or not torn:
            last = Line(path, last.number + 1 if last.path == path else 1, b"")
        return report(_missing(newest.seq + 1, seq))
    return report()


def _follow(newest: Position, line: Line, known: Sequence[Position], key: bytes | None) -> Position:
    """The position of the record in *line*.

    :raise ValueError: When the record does not follow *newest*; the message gives the reason.
    """
    entry = AuditEntry.parse(line.text.removesuffix(b"\n"))
    if key is not None and not hmac.compare_digest(entry.mac, record_mac(key, entry.position)):
        raise ValueError("the record was not written with this log's key")
    expected = newest.seq + 1
    if entry.seq > expected:
        raise ValueError(_missing(expected, entry.seq - 1))
    if entry.seq < expected:
        raise ValueError(f"found record {entry.seq} in place of record {expected}")
    if entry.previous != newest.hash:
        raise ValueError(f"record {entry.seq} does not follow the record before it")
    if any(entry.seq == seq and entry.hash != hash_ for seq, hash_ in known):
        raise ValueError(f"record {entry.seq} differs from the record that was written")
    if entry.document["action"] == LOST_HEAD:
        raise ValueError("the log's head was lost here, and earlier records may be lost, too")
    return entry.position


def _missing(first: int, last: int) -> str:
    return f"record {first} is missing" if first == last else f"records {first} to {last} are missing"
