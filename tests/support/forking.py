"""Runs a function in a forked child process, which reports to the test."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

Report = Callable[[object], None]
"""Sends an object's string to the parent, as a line."""


@dataclass(frozen=True)
class Child:
    """A forked child process. Call :meth:`wait` in the end.

    :ivar pid: its process ID.
    """

    pid: int
    _reports: TextIO

    def line(self) -> str:
        """Wait for the next line that the child reports; empty when the child has ended."""
        return self._reports.readline().rstrip("\n")

    def lines(self) -> list[str]:
        """Wait for the child's end: all lines reported until then."""
        return self._reports.read().splitlines()

    def kill(self) -> None:
        """Send SIGKILL, and wait for the child's end."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Wait for the child's end.

        :return: 0 if the function returned, 1 after an exception, or the negative number of the signal.
        """
        _, status = os.waitpid(self.pid, 0)
        self._reports.close()
        return os.waitstatus_to_exitcode(status)


def fork(work: Callable[[Report], object]) -> Child:
    """Run *work* in a forked child process; an exception is printed there."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return Child(pid, os.fdopen(reading))
    status = 1
    try:
        os.close(reading)
        work(lambda report: os.write(writing, f"{report}\n".encode()))
        status = 0
    except BaseException as exc:  # noqa: BLE001 -- a child must never go on as a second pytest
        sys.excepthook(type(exc), exc, exc.__traceback__)
    finally:
        os._exit(status)


def run_forked(work: Callable[[], object]) -> int:
    """Run *work* in a forked child process and wait for its end: its exit status as in :meth:`Child.wait`."""
    return fork(lambda _report: work()).wait()
