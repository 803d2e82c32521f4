"""Results of benchmarks, as rows of virt-sse against a peer, and functions to measure time."""

from __future__ import annotations

import enum
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self


class Unit(enum.Enum):
    """Unit of a number. Lower is better for seconds, higher is better for all other units."""

    SECONDS = "s"
    MIB_PER_SECOND = "MiB/s"
    DISKS_PER_SECOND = "disks/s"
    PER_SECOND = "/s"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measured value.

    :ivar samples: the samples whose median is *value*, in order of measurement; may be empty.
    """

    value: float
    unit: Unit
    samples: tuple[float, ...] = ()

    @classmethod
    def median(cls, samples: Sequence[float], unit: Unit = Unit.SECONDS) -> Self:
        """The median of *samples*, at least one."""
        return cls(statistics.median(samples), unit, tuple(samples))

    def __str__(self) -> str:
        if self.unit is not Unit.SECONDS:
            return f"{self.value:.0f} {self.unit.value}"
        return f"{self.value:.2f} s" if self.value >= 1 else f"{self.value * 1000:.1f} ms"

    def as_json(self) -> dict[str, object]:
        return {"value": self.value, "unit": self.unit.value, "samples": list(self.samples)}


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a row. For information only: missing a target is not an error.

    :ivar seconds: maximum duration of virt-sse's measurement.
    :ivar ratio: minimum ratio.
    """

    seconds: float | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.seconds is not None:
            parts.append(f"<= {self.seconds * 1000:.0f} ms")
        if self.ratio is not None:
            parts.append(f">= {self.ratio:g}x")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    :ivar name: identity across runs, e.g. ``create/qcow2``.
    :ivar what: description of the measurement.
    :ivar peer_name: description of *peer*.
    :ivar details: further numbers of the same measurement; each name includes the unit.
    :ivar note: what limits the measurement; for a missed target.
    """

    name: str
    what: str
    ours: Measurement
    peer: Measurement | None = None
    peer_name: str = ""
    target: Target | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Speed of virt-sse relative to the peer; above 1 is faster, for every unit."""
        if self.peer is None or not self.peer.value or not self.ours.value:
            return None
        quotient = self.ours.value / self.peer.value
        return 1 / quotient if self.ours.unit is Unit.SECONDS else quotient

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` when there is none."""
        if self.target is None:
            return None
        slow = self.target.seconds is not None and self.ours.value > self.target.seconds
        behind = self.target.ratio is not None and (self.ratio is None or self.ratio < self.target.ratio)
        return not (slow or behind)

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "what": self.what,
            "ours": self.ours.as_json(),
            "peer": {"name": self.peer_name, **self.peer.as_json()} if self.peer else None,
            "ratio": self.ratio,
            "target": {"seconds": self.target.seconds, "ratio": self.target.ratio} if self.target else None,
            "met": self.met,
            "details": dict(self.details),
            "note": self.note,
        }

    def as_aim(self) -> dict[str, object]:
        """The row's cells in the table of the figures with a target."""
        low, high = (self.details.get(name) for name in ("ratio_min", "ratio_max"))
        ratio = None if self.ratio is None else f"{self.ratio:.2f}x"
        if ratio and low is not None and high is not None:
            ratio += f" ({low:.2f}-{high:.2f})"
        return {
            "figure": self.what,
            "measured": self.ours,
            "ratio": ratio,
            "peer": self.peer_name,
            "wanted": self.target,
            "met": "yes" if self.met else "MISSED",
            "limit": "" if self.met else self.note,
        }

    def as_cells(self) -> dict[str, object]:
        """The row's cells in the table."""
        missed = "  MISSED" if self.met is False else ""
        return {
            "what": self.what,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": None if self.ratio is None else f"{self.ratio:.2f}x",
            "target": f"{self.target}{missed}" if self.target else None,
            "peer name": self.peer_name,
            "details": " ".join(f"{name}={_short(value)}" for name, value in self.details.items()),
        }


def _short(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Run:
    """Parameters of a run.

    :ivar quick: whether to use fewer samples and less data.
    :ivar scratch: a folder for the run, removed at its end.
    """

    quick: bool
    scratch: Path

    def amount(self, usual: int, *, quick: int) -> int:
        """A number of samples or an amount of data, depending on :attr:`quick`."""
        return quick if self.quick else usual


Bench = Callable[[Run], Iterator[Row]]
"""A benchmark: yields each row when measured, and leaves nothing outside the scratch folder.

Raises :class:`~virt_sse.errors.LabUnavailableError` when the machine lacks a requirement.
"""


def seconds(action: Callable[[], object]) -> float:
    """Duration of *action* in seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def alternate(count: int, *actions: Callable[[], object]) -> list[Measurement]:
    """Time each of *actions* *count* times, in turns, so that changes of the machine's load affect all alike.

    Each action first runs once untimed.
    """
    for action in actions:
        action()
    turns = [[seconds(action) for action in actions] for _ in range(count)]
    return [Measurement.median(samples) for samples in zip(*turns, strict=True)]
