"""Processes that outlive the command that started them.

Linux makes a subreaper (PR_SET_CHILD_SUBREAPER in prctl(2)) the parent of each descendant whose parent has
ended. No descendant is missed: not after ``setsid``, with another environment, or in another namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from support.waiting import wait_until

_PR_SET_CHILD_SUBREAPER = 36


class Leftovers:
    """The descendants that this process gets during the block."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def __enter__(self) -> Self:
        self._known = set(descendants())
        _be_subreaper(wanted=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.found()  # reaps
        _be_subreaper(wanted=False)

    def found(self) -> dict[int, str]:
        """The processes: state and command line by process ID. Reaps those that have ended."""
        left = {pid: said for pid, said in descendants().items() if pid not in self._known}
        for pid in [pid for pid, said in left.items() if said.startswith("Z")]:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del left[pid]
        return left

    def check(
        self,
        *,
        beside: Collection[int] = (),
        meanwhile: Callable[[], object] = lambda: None,
        seconds: float = 20,
    ) -> None:
        """Wait until no process is left.

        :param beside: processes that may run.
        :param meanwhile: called again and again.
        :raise AssertionError: When some are left after *seconds*.
        """
        try:
            wait_until(
                lambda: meanwhile() or self.found().keys() <= {*beside}, "no process is left", seconds=seconds
            )
        except AssertionError as error:
            error.add_note(f"left: {self.found()}")
            raise


def _be_subreaper(*, wanted: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


def descendants() -> dict[int, str]:
    """State letter and command line of each descendant of this process, by process ID."""
    children, said = defaultdict(list), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(folder.name)
            state, parent = (folder / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
            command = (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
            children[int(parent)].append(pid)
            said[pid] = f"{state} {command}".strip()
    found, pending = {}, [os.getpid()]
    while pending:
        for pid in children[pending.pop()]:
            found[pid] = said[pid]
            pending.append(pid)
    return found
