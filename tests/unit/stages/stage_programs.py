"""Programs for stages' processes, and what they are seen to be from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from virt_sse.stages.locked_process import Command, LockedProcess

SLEEP = Command(["sleep", "60"])


def say(script: str) -> Command:
    """A shell that runs *script* and ends; what it says is in its log."""
    return Command(["sh", "-c", script])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)


def wait_end(process: LockedProcess) -> str:
    """What the process has said when it has ended."""
    wait_until(lambda: process.pid() is None)
    return process.log


def status(pid: int) -> dict[str, str]:
    """proc(5), ``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
