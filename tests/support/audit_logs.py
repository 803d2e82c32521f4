"""Audit logs for the tests of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result

MOMENT = datetime(2026, 1, 31, 12, 30, 15, 250_000, UTC)


def make(number: int = 0, *, result: Result = Result.ALLOWED, reason: str | None = None) -> AuditRecord:
    return AuditRecord(
        component=Component.HOST,
        actor="root(0),virt-sse[4711]",
        action="unwrap",
        key="platform-managed:default",
        key_version="7f",
        disk=UUID(int=number + 1),
        slot="service",
        source="host-1",
        result=result,
        reason=reason,
        correlation=uuid4(),
        time=MOMENT + timedelta(seconds=number),
    )


def open_log(folder: Path) -> AuditLog:
    """A log in ``log`` whose key is in ``state``. Rolls at every third record."""
    return AuditLog(folder / "log/audit.jsonl", key=folder / "state/audit.key", roll_size=1500)


def fill(log: AuditLog) -> AuditLog:
    """Seven records in three files."""
    for number in range(7):
        log.append(make(number))
    assert [path.name for path in log.files()] == ["audit-0001.jsonl", "audit-0002.jsonl", "audit.jsonl"]
    return log


def read(log: AuditLog) -> list[bytes]:
    """All lines of all files."""
    return [line for path in log.files() for line in path.read_bytes().splitlines(keepends=True)]


def is_whole(log: AuditLog) -> bool:
    return log.verify().broken is None


def broken(log: AuditLog) -> tuple[str, int, int, str]:
    """The place where the log is broken: file, line and expected record; and the reason."""
    found = log.verify().broken
    assert found
    return found.path.name, found.line, found.seq, found.reason
