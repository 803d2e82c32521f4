"""Files and children of a process that opens, closes and ends them meanwhile."""

from __future__ import annotations

import contextlib
from pathlib import Path


def open_files(pid: int | None) -> dict[int, Path]:
    """What each file descriptor of a process names, by the descriptor's number.

    A descriptor that the process has closed since the listing is left out.
    """
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = entry.readlink()
    return found


def children(pid: int) -> dict[int, list[str]]:
    """The command lines of the children of a process, of all its threads, by process id.

    A thread or child that has ended since the listing is left out.
    """
    found = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (thread / "children").read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    command = Path(f"/proc/{child}/cmdline").read_text(errors="replace")
                    found[int(child)] = command.split("\0")[:-1]
    return found
