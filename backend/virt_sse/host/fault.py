"""A fault found by ``virt-sse host doctor``."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.Enum):
    """``ERROR``: data is at risk, or domains do not start. ``WARNING``: a protection or a function is off."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class HostFault:
    """A fault of a host.

    :ivar id: names the kind of the fault; the same in all versions.
    :ivar part: the faulty part of the host: ``disk NAME``, ``state``, ``hook``, ``library``, …
    :ivar remedy: a command, or advice.
    """

    id: str
    part: str
    problem: str
    remedy: str
    severity: Severity = Severity.ERROR
