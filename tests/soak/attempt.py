"""One kill of one operation, and the checks after the kill."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

from soak.invariants import check_files
from soak.kill_points import Ended, KillBy, KillPoint, Measured, measure, run
from soak.operations import FileOperation
from soak.sites import FileSite
from support.command_line import PROGRAM
from support.leftovers import Leftovers


class Outcome(Enum):
    """The state in which the next command found the host."""

    BEFORE = "as before"
    AFTER = "as after"
    NOT_KILLED = "not killed"


@dataclass(frozen=True, slots=True)
class Failure:
    """A kill after which something did not hold."""

    operation: str
    seed: int
    point: KillPoint | None
    error: str

    @classmethod
    def of(cls, error: Exception, operation: str, seed: int, point: KillPoint | None) -> Failure:
        """The failure that *error* reports."""
        notes = "".join(f" [{note}]" for note in getattr(error, "__notes__", ()))
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return cls(operation, seed, point, f"{type(error).__name__} at {place}: {error}{notes}")

    def __str__(self) -> str:
        at = f" --at {self.point}" if self.point else ""
        again = f"python -m soak --only {self.operation}:{self.seed}{at}"
        return f"{self.operation}: {self.error}\n    again: {again}"


class Attempts:
    """Kills the operations of one site; each operation is measured once."""

    def __init__(self, site: FileSite) -> None:
        self._site = site
        self._measured: dict[str, Measured] = {}

    def __call__(self, operation: FileOperation, seed: int, at: KillPoint | None = None) -> Outcome | Failure:
        """Kill *operation* at a moment that *seed* chooses, or at *at*."""
        with Leftovers() as self._site.leftovers:
            return self._reported(operation, seed, at)

    def _reported(self, operation: FileOperation, seed: int, at: KillPoint | None) -> Outcome | Failure:
        point = at
        try:
            measured = self._measure(operation)
            point = at or KillPoint.choose(Random(f"{operation.name}:{seed}"), measured)  # noqa: S311 -- a seed
            return self._attempt(operation, point)
        except Exception as exc:  # noqa: BLE001 -- every failure is reported, and the soak goes on
            return Failure.of(exc, operation.name, seed, point)

    def _command(self, operation: FileOperation) -> list[str]:
        return [str(PROGRAM), *map(str, operation.arguments(self._site))]

    def _measure(self, operation: FileOperation) -> Measured:
        if operation.name not in self._measured:
            operation.prepare(self._site)
            command, trace = self._command(operation), self._site.folder / "trace"
            measured, ended = measure(command, trace, environment=self._site.environment)
            assert ended.status == 0, f"undisturbed: {ended}"
            operation.check(self._site)
            self._measured[operation.name] = measured
        return self._measured[operation.name]

    def _attempt(self, operation: FileOperation, point: KillPoint) -> Outcome:
        operation.prepare(self._site)
        ended = run(point.around(self._command(operation)), environment=self._site.environment)
        if not ended.killed and point.by is not KillBy.ANY_CALL:
            assert ended.status == 0, f"undisturbed: {ended}"
        assert "Traceback" not in ended.output, ended.output
        has_effect = operation.check(self._site)
        self._repeat(operation)
        if not ended.killed and ended.status == 0:
            return Outcome.NOT_KILLED
        return Outcome.AFTER if has_effect else Outcome.BEFORE

    def _repeat(self, operation: FileOperation) -> None:
        """Run the command again, as an operator would: it succeeds, or says that nothing is left to do."""
        again: Ended = run(self._command(operation), environment=self._site.environment)
        assert "Traceback" not in again.output, again.output
        refused = any(part in again.output for part in operation.refusals)
        assert again.status == 0 or refused, f"repeated: {again}"
        operation.check(self._site)
        check_files(self._site)
        self._site.await_quiet()
