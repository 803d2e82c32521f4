"""Programs for the processes of stages, and how the kernel shows these processes."""

from __future__ import annotations

from pathlib import Path

from support.waiting import wait_until
from virt_sse.stages.locked_process import Command, LockedProcess

SLEEP = Command(["sleep", "60"])


def say(script: str) -> Command:
    """A shell that runs *script* and ends; its output is in the process's log."""
    return Command(["sh", "-c", script])


def wait_end(process: LockedProcess) -> str:
    """Wait for the end of the process: its log."""
    wait_until(lambda: process.pid() is None, "the process has ended")
    return process.log


def status(pid: int) -> dict[str, str]:
    """proc(5), ``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
