"""Whether an audit log is whole."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from virt_sse.audit.record import GENESIS, LOST_HEAD, AuditEntry, Position, record_mac


class Line(NamedTuple):
    """A line of the log and where it stands; the first of a file is number 1.

    :ivar text: with its newline, unless the file ends before, or the line is far too long.
    """

    path: Path
    number: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Break:
    """The first place where a log is not what was written.

    :ivar seq: the number of the record that should stand there.
    """

    path: Path
    line: int
    seq: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found.

    :ivar newest: the last record that is whole, up to the break if there is one; its number is their count.
    :ivar authentic: whether their MACs were checked, too, which takes the log's key.
    :ivar beyond_head: how many are newer than the head says: while they are being written, or after a kill.
    :ivar torn: whether the end is a torn record, which the next writer will see to.
    :ivar broken: ``None`` when the log is whole.
    """

    newest: Position
    authentic: bool
    beyond_head: int
    torn: bool
    broken: Break | None


def check(
    path: Path, lines: Iterable[Line], *, head: Position, anchor: Position | None, key: bytes | None
) -> VerifyReport:
    """Follow the chain through all of *lines*, oldest first.

    :param path: the file of the newest.
    :param anchor: a record that was there once.
    :param key: checks the MACs, too.
    """
    newest, last, torn = GENESIS, Line(path, 0, b""), False
    known = [head, *([anchor] if anchor else [])]

    def report(broken: str | None = None) -> VerifyReport:
        place = Break(last.path, last.number, newest.seq + 1, broken) if broken else None
        return VerifyReport(newest, key is not None, max(0, newest.seq - head.seq), torn, place)

    for line in lines:
        if torn:
            return report("it is no record")
        last = line
        try:
            newest = _follow(newest, line, known, key)
        except ValueError as exc:
            if line.text.endswith(b"\n"):
                return report(str(exc))
            torn = True  # if it is the last
    if (seq := max(known).seq) > newest.seq:
        if last.path != path or not torn:
            last = Line(path, last.number + 1 if last.path == path else 1, b"")
        return report(_missing(newest.seq + 1, seq))
    return report()


def _follow(newest: Position, line: Line, known: Sequence[Position], key: bytes | None) -> Position:
    """The position of the record in *line*.

    :raise ValueError: When it is not the one that follows *newest*; says why.
    """
    entry = AuditEntry.parse(line.text.removesuffix(b"\n"))
    if key is not None and not hmac.compare_digest(entry.mac, record_mac(key, entry.position)):
        raise ValueError("the record was not written with this log's key")
    expected = newest.seq + 1
    if entry.seq > expected:
        raise ValueError(_missing(expected, entry.seq - 1))
    if entry.seq < expected:
        raise ValueError(f"record {entry.seq} stands where record {expected} should")
    if entry.previous != newest.hash:
        raise ValueError(f"record {entry.seq} does not follow the record before it")
    if any(entry.seq == seq and entry.hash != hash_ for seq, hash_ in known):
        raise ValueError(f"record {entry.seq} is not the one that was written")
    if entry.document["action"] == LOST_HEAD:
        raise ValueError("the log's head was lost here, and perhaps records before this one")
    return entry.position


def _missing(first: int, last: int) -> str:
    return f"record {first} is missing" if first == last else f"records {first} to {last} are missing"
