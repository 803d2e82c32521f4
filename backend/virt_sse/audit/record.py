"""Records of the audit log, one per key use, and their line format."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import hmac
import json
import os
import pwd
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

LOST_HEAD = "lost-head"
"""Action of the log's own record about a lost head; earlier records may be lost, too."""

TORN_RECORD = "torn-record"
"""Action of the log's own record with the remains of a torn record, left by a killed writer."""

_FORMAT = 1
_LONGEST_TEXT = 2000
"""Maximum length of a field in characters: callers choose some fields, and must not fill the disk."""

_SEAL = re.compile(rb',"hash":"([0-9a-f]{64})","mac":"([0-9a-f]{64})"\}')
_SEAL_LENGTH = len(b',"hash":"","mac":""}') + 2 * 64


class Component(enum.Enum):
    """Part of virt-sse that wrote a record."""

    HOST = "host"
    AGENT = "agent"
    VAULT = "vault"


class Result(enum.Enum):
    """Result of an action. ``REQUESTED`` is recorded before an irreversible action, e.g. a rotation."""

    REQUESTED = "requested"
    ALLOWED = "allowed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One use of a key. No field may contain key material.

    :ivar actor: see :func:`process_actor` for the host; the principal's id for the vault.
    :ivar action: ``wrap``, ``unwrap``, ``rotate``, …
    :ivar key: ``provider:name``, or a key vault's URL of the key without its version.
    :ivar source: the host's name, or the client's address.
    :ivar correlation: shared by the host's and the vault's record of the same use.
    :ivar time: UTC, in milliseconds.
    """

    component: Component
    actor: str
    action: str
    key: str
    key_version: str | None = None
    disk: UUID | None = None
    slot: str | None = None
    domain: str | None = None
    source: str
    result: Result
    reason: str | None = None
    correlation: UUID
    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def as_json(self) -> dict[str, object]:
        """The record's fields as written to the log; long texts are truncated."""
        return {
            "time": self.time.astimezone(UTC).isoformat(timespec="milliseconds"),
            "component": self.component.value,
            "actor": _cut(self.actor),
            "action": _cut(self.action),
            "key": _cut(self.key),
            "key-version": _cut(self.key_version),
            "disk": str(self.disk) if self.disk else None,
            "slot": _cut(self.slot),
            "domain": _cut(self.domain),
            "source": _cut(self.source),
            "result": self.result.value,
            "reason": _cut(self.reason),
            "correlation": str(self.correlation),
        }


_FIELDS = {field.name.replace("_", "-") for field in dataclasses.fields(AuditRecord)}


class Position(NamedTuple):
    """A record's place in the chain."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


GENESIS = Position(0, "0" * 64)
"""Predecessor of the first record."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A record as read from a line of the log.

    :ivar seq: counts from 1, across files.
    :ivar previous: hash of the previous record.
    :ivar hash: SHA-256 (hex) of the line up to the hash, including *previous*.
    :ivar mac: HMAC-SHA256 (hex) of the hash, under the log's key.
    """

    seq: int
    previous: str
    hash: str
    mac: str
    document: dict[str, str | None] = field(repr=False)

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Parse a line.

        :param line: a line without its newline.
        :raise ValueError: When *line* is not a record, or was altered; the message tells the reason.
        """
        content, seal = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line, max(0, len(line) - _SEAL_LENGTH))
        if not seal:
            raise ValueError("not a record")
        found = seal[1].decode()
        if hashlib.sha256(content).hexdigest() != found:
            raise ValueError("the record was altered")
        try:
            document = json.loads(content + b"}")
            form, seq, previous = (document.pop(name) for name in ("format", "seq", "previous"))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
            raise ValueError("not a record") from exc
        if (
            form != _FORMAT
            or type(seq) is not int
            or not isinstance(previous, str)
            or document.keys() != _FIELDS
            or not all(value is None or isinstance(value, str) for value in document.values())
        ):
            raise ValueError("unknown format of a record")
        entry = cls(seq, previous, found, seal[2].decode(), document)
        if _moment(document["time"]) is None:
            raise ValueError("a record without a valid time")
        return entry

    @property
    def position(self) -> Position:
        return Position(self.seq, self.hash)

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.document["time"] or "")

    def is_of_key(self, key: str) -> bool:
        """Whether *key* is the record's key, with or without the version after ``:`` or ``/``."""
        name, version = self.document["key"], self.document["key-version"]
        return key in (name, f"{name}:{version}", f"{name}/{version}")

    def as_json(self) -> dict[str, object]:
        """All fields of the line."""
        chain = {"previous": self.previous, "hash": self.hash, "mac": self.mac}
        return {"seq": self.seq, **self.document, **chain}

    @property
    def record(self) -> AuditRecord:
        """The record as appended."""
        text = self.document
        return AuditRecord(
            time=self.time,
            component=Component(text["component"]),
            actor=text["actor"] or "",
            action=text["action"] or "",
            key=text["key"] or "",
            key_version=text["key-version"],
            disk=UUID(text["disk"]) if text["disk"] else None,
            slot=text["slot"],
            domain=text["domain"],
            source=text["source"] or "",
            result=Result(text["result"]),
            reason=text["reason"],
            correlation=UUID(text["correlation"]),
        )


def _moment(text: str | None) -> datetime | None:
    """The time *text*; ``None`` if invalid or without an offset from UTC: such times do not compare."""
    try:
        moment = datetime.fromisoformat(text or "")
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def note(record: AuditRecord, action: str, reason: str) -> dict[str, object]:
    """Fields of a record about the log itself, written along with *record*; *reason* is not truncated."""
    about = AuditRecord(
        component=record.component,
        actor=record.actor,
        action=action,
        key="-",
        source=record.source,
        result=Result.ALLOWED,
        correlation=record.correlation,
        time=record.time,
    )
    return {**about.as_json(), "reason": reason}


def seal(fields: dict[str, object], after: Position, key: bytes) -> tuple[bytes, Position]:
    """Chain *fields* to the record at *after*. Returns the line with its newline, and its position."""
    document = {"format": _FORMAT, "seq": after.seq + 1, **fields, "previous": after.hash}
    content = json.dumps(document, separators=(",", ":")).encode()[:-1]
    position = Position(after.seq + 1, hashlib.sha256(content).hexdigest())
    mac = record_mac(key, position)
    return content + f',"hash":"{position.hash}","mac":"{mac}"}}\n'.encode(), position


def record_mac(key: bytes, position: Position) -> str:
    """MAC of a record: proves possession of the log's key by the writer."""
    return hmac.digest(key, f"record {position}".encode(), "sha256").hex()


def head_mac(key: bytes, position: Position) -> str:
    """MAC of the head; differs from the record's MAC, because the latter could be copied from the line."""
    return hmac.digest(key, f"head {position}".encode(), "sha256").hex()


def process_actor() -> str:
    """Actor of this process: its real user, sudo's original user if any, and the program.

    For example ``root(0),sudo:alice,virt-sse[4711]``. The name from sudo is an unverified environment
    variable.
    """
    sudo_user = os.environ.get("SUDO_USER")
    by = f",sudo:{sudo_user}" if sudo_user else ""
    program = Path(sys.argv[0]).name or "python"
    return f"{_user(os.getuid())}{by},{program}[{os.getpid()}]"


@functools.cache
def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}({uid})"
    except KeyError:
        return f"?({uid})"


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…"
