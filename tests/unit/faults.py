"""Faults that a test brings about for real: a full disk, a kill -9 at any line."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import TraceFunction


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a full disk, writes beyond *size* bytes into a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def killed_at_line(number: int, modules: Iterable[ModuleType], action: Callable[[], object]) -> bool:
    """Run *action* in a child process that kills itself before the *number*-th line it executes of *modules*.

    :return: whether it was killed; if not, *action* has fewer lines and is done.
    """
    child = os.fork()
    if not child:
        _kill_at_line(number, {module.__file__ for module in modules}, action)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the action failed"
    return code != 0


def _kill_at_line(number: int, files: set[str | None], action: Callable[[], object]) -> None:
    left = number

    def trace(frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    status = 1
    try:
        sys.settrace(trace)
        action()
        status = 0
    finally:
        os._exit(status)
