"""Real faults: a full disk, and a kill -9 at any line."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

from support.forking import Report, fork, run_forked

if TYPE_CHECKING:
    from _typeshed import TraceFunction

Action = Callable[[], object]

EVERY_KILL = bool(os.environ.get("VIRT_SSE_EVERY_KILL"))
"""Whether tests try every line, byte and kind of disk, and each race often. By default they try some."""
STEP = 1 if EVERY_KILL else 4
"""From one tried line to the next."""


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let writes beyond *size* bytes into a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def crash_points(modules: Iterable[ModuleType], action: Action) -> list[int]:
    """Run *action* in a child process, and count the line events of *modules*.

    :return: for each line, the number of its first event; give these to :func:`dies_at`.
    """

    def work(report: Report) -> None:
        events: list[tuple[str, int]] = []
        with _traced(modules, lambda frame: events.append((frame.f_code.co_filename, frame.f_lineno))):
            action()
        first = {event: number for number, event in reversed(list(enumerate(events, start=1)))}
        for number in sorted(first.values()):
            report(number)

    child = fork(work)
    points = [int(line) for line in child.lines()]
    assert child.wait() == 0, "the action failed"
    return points


def some(points: Sequence[int], most: int) -> list[int]:
    """About *most* of *points*, evenly spread, with the last; all of them with :data:`EVERY_KILL`."""
    step = 1 if EVERY_KILL else max(1, len(points) // most)
    return sorted({*points[::step], points[-1]})


def dies_at(point: int, modules: Iterable[ModuleType], action: Action) -> bool:
    """Run *action* in a child process that kills itself before line event *point* of *modules*.

    :return: whether the child was killed; false when *action* has fewer line events and is done.
    """
    left = point

    def count(_frame: FrameType) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with _traced(modules, count):
            action()

    code = run_forked(work)
    assert code in (0, -signal.SIGKILL), "the action failed"
    return code != 0


@contextmanager
def _traced(modules: Iterable[ModuleType], on_line: Callable[[FrameType], object]) -> Iterator[None]:
    files = {module.__file__ for module in modules}

    def trace(frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            on_line(frame)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
