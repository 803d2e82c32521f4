"""Kills a child process with -9 at a line of choice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType, ModuleType
from typing import NoReturn

Action = Callable[[], object]


def crash_points(modules: Iterable[ModuleType], action: Action) -> list[int]:
    """Run *action* in a child process: the number of each line event of *modules* that is a line's first."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        events: list[tuple[str, int]] = []

        def finish() -> None:
            first = {event: number for number, event in reversed(list(enumerate(events, start=1)))}
            with os.fdopen(writing, "w") as pipe:
                pipe.write(" ".join(map(str, sorted(first.values()))))

        _run(modules, action, lambda frame: events.append((frame.f_code.co_filename, frame.f_lineno)), finish)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        points = [int(number) for number in pipe.read().split()]
    _, status = os.waitpid(child, 0)
    assert status == 0, "the action failed"
    return points


def dies_at(point: int, modules: Iterable[ModuleType], action: Action) -> bool:
    """Run *action* in a child process that kills itself before line event *point*; whether it came so far."""
    if not (child := os.fork()):
        left = point

        def count(_frame: FrameType) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        _run(modules, action, count, lambda: None)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the action failed"
    return code != 0


def _run(
    modules: Iterable[ModuleType],
    action: Action,
    on_line: Callable[[FrameType], object],
    finish: Callable[[], None],
) -> NoReturn:
    files = {module.__file__ for module in modules}

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            on_line(frame)
        return trace

    status = 1
    try:
        sys.settrace(trace)  # type: ignore[arg-type] # its type is recursive
        action()
        sys.settrace(None)
        finish()
        status = 0
    except BaseException as exc:  # noqa: BLE001 -- a child must never go on as a second pytest
        sys.excepthook(type(exc), exc, exc.__traceback__)
    finally:
        os._exit(status)
