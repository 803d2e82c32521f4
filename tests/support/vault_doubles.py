"""A clock and an audit log for tests of the vault's rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from virt_sse.audit.record import AuditRecord

DAY = 86400


@dataclass
class Clock:
    """A clock set by hand."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Records:
    """An audit log in memory."""

    all: list[AuditRecord] = field(default_factory=list)

    def append(self, record: AuditRecord) -> None:
        self.all.append(record)
