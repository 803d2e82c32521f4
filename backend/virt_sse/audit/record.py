"""What the audit log holds: one record per key use, and how it lies in a line."""

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
"""The action of the log's own record that its head was lost, so that records before it may be."""

TORN_RECORD = "torn-record"
"""The action of the log's own record that holds what a killed writer left of one."""

_FORMAT = 1
_LONGEST_TEXT = 2000
"""Of a field, in characters: callers choose some of them, and must not fill the disk."""

_SEAL = re.compile(rb',"hash":"([0-9a-f]{64})","mac":"([0-9a-f]{64})"\}')
_SEAL_LENGTH = len(b',"hash":"","mac":""}') + 2 * 64


class Component(enum.Enum):
    """Which part of virt-sse a record is from."""

    HOST = "host"
    AGENT = "agent"
    VAULT = "vault"


class Result(enum.Enum):
    """What became of it. ``REQUESTED`` goes before what cannot be taken back, e.g. a rotation."""

    REQUESTED = "requested"
    ALLOWED = "allowed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One use of a key. Holds no key material, and neither may any of its texts.

    :ivar actor: who: see :func:`process_actor` for the host, the principal's id for the vault.
    :ivar action: ``wrap``, ``unwrap``, ``rotate``, …
    :ivar key: ``provider:name``, or a key vault's URL of the key without its version.
    :ivar source: from where: the host's name, or the client's address.
    :ivar correlation: the same in the host's and in the vault's record of one use.
    :ivar time: UTC, kept in milliseconds.
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
        """The record as the log has it; texts that are too long are cut off."""
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
"""What the first record follows."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A record in its line of the log.

    :ivar seq: counts from 1, across files.
    :ivar previous: the hash of the record before.
    :ivar hash: SHA-256 (hex) of the line up to the hash, so of *previous* as well.
    :ivar mac: HMAC-SHA256 (hex) of the hash, under the log's key.
    """

    seq: int
    previous: str
    hash: str
    mac: str
    document: dict[str, str | None] = field(repr=False)

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """The entry in *line*, which ends without a newline.

        :raise ValueError: When it is none, or was altered; the message says which.
        """
        content, seal = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line, max(0, len(line) - _SEAL_LENGTH))
        if not seal:
            raise ValueError("it is no record")
        found = seal[1].decode()
        if hashlib.sha256(content).hexdigest() != found:
            raise ValueError("the record was altered")
        try:
            document = json.loads(content + b"}")
            form, seq, previous = (document.pop(name) for name in ("format", "seq", "previous"))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
            raise ValueError("it is no record") from exc
        if form != _FORMAT or not isinstance(seq, int) or document.keys() != _FIELDS:
            raise ValueError("it is no record that this version knows")
        return cls(seq, previous, found, seal[2].decode(), document)

    @property
    def position(self) -> Position:
        return Position(self.seq, self.hash)

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.document["time"] or "")

    def is_of_key(self, key: str) -> bool:
        """Whether *key* is the record's, without its version or with it behind ``:`` or ``/``."""
        name, version = self.document["key"], self.document["key-version"]
        return key in (name, f"{name}:{version}", f"{name}/{version}")

    def as_json(self) -> dict[str, object]:
        """What the line holds."""
        chain = {"previous": self.previous, "hash": self.hash, "mac": self.mac}
        return {"seq": self.seq, **self.document, **chain}

    @property
    def record(self) -> AuditRecord:
        """The record, as it was appended."""
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


def note(record: AuditRecord, action: str, reason: str) -> dict[str, object]:
    """What the log says of itself, written with *record*; *reason* is kept in full."""
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
    """The line, with its newline, that chains *fields* to the record at *after*; and its own place."""
    document = {"format": _FORMAT, "seq": after.seq + 1, **fields, "previous": after.hash}
    content = json.dumps(document, separators=(",", ":")).encode()[:-1]
    position = Position(after.seq + 1, hashlib.sha256(content).hexdigest())
    mac = record_mac(key, position)
    return content + f',"hash":"{position.hash}","mac":"{mac}"}}\n'.encode(), position


def record_mac(key: bytes, position: Position) -> str:
    """What stands in a record, and says that whoever wrote it had the log's key."""
    return hmac.digest(key, f"record {position}".encode(), "sha256").hex()


def head_mac(key: bytes, position: Position) -> str:
    """What stands in the head; another than the record's own, which anyone could copy from its line."""
    return hmac.digest(key, f"head {position}".encode(), "sha256").hex()


def process_actor() -> str:
    """Who this process acts for: its real user, whom sudo names if it does, and the program.

    For example ``root(0),sudo:alice,virt-sse[4711]``. What sudo names is only said by the environment.
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
