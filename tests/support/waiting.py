"""Waiting for the effects of other processes and threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], message: str, *, seconds: float = 20) -> float:
    """Wait until *condition* returns a true value.

    :param message: the condition in words, for the failure: ``the guest has ended``.
    :return: how many seconds the wait took.
    :raise AssertionError: When the condition is still false after *seconds*.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {message}"
        time.sleep(0.02)
    return time.monotonic() - began


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(") ", 1)[1][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
