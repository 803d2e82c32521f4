"""Limits of the lab's waits. An error names the process or condition that the lab waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from virt_sse.errors import LabError

_POLL = 0.02


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait for a condition.

    :param what: the condition, in words: "libvirtd's end".
    :raise LabError: When *seconds* pass before.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise LabError(f"the lab waited {seconds:g} s in vain for {what}")
        time.sleep(_POLL)


def run_limited(argv: Sequence[str | Path], what: str, seconds: float) -> tuple[int, str]:
    """Run a program without input, together with its children. Returns the exit status and all output.

    :raise LabError: When the program does not end within *seconds*; a note contains the end of its output.
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except BaseException as exc:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if not isinstance(exc, subprocess.TimeoutExpired):
            raise
        error = LabError(f"{what} did not end within {seconds:g} s")
        error.add_note(said[-2000:])
        raise error from None
    return process.returncode, said


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, e.g. nsenter(1) with the program inside a lab host."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    process.kill()
