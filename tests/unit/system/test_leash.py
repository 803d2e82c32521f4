"""Kills at each moment of the start of a confined tool: no process is ever left.

``VIRT_SSE_LEASH_KILLS=2000`` makes so many kills at random moments, and as many more as ``FEW``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from support.images import require
from support.leftovers import Leftovers
from support.waiting import wait_until

VICTIMS = ("caller", "first", "second", "third")
"""Generations of processes: virt-sse, the child of virt-sse, and so on."""
STEADY = 4
SCRIPT = """
import os, sys
from pathlib import Path
from virt_sse.system.confinement import BoundFile, Confinement
from virt_sse.system.tools import run
image = Path(sys.argv[1])
sys.excepthook = lambda *_: None
run(["sleep", "60"], confinement=Confinement(files=[BoundFile(image, os.open(image, os.O_RDWR), True)]))
"""


@dataclass(frozen=True, slots=True)
class Kill:
    """The moment of a kill.

    :ivar call: name of a system call for strace, or ``all``.
    :ivar at: the number of the call in each process, from 1; the process stops after this call.
    :ivar stop: the number of the stop, from 1; earlier stops are continued. With fewer stops, the tool runs.
    """

    call: str
    at: int
    stop: int
    victim: str

    def __str__(self) -> str:
        return f"{self.call}-{self.at}-{self.stop}-{self.victim}"


FEW = [
    Kill("prctl", 1, 1, "caller"),  # setpriv
    Kill("prctl", 1, 2, "first"),  # unshare's child
    Kill("all", 600, 1, "third"),  # the tool runs
]
_SLOW_WRITES = ("-e", "inject=write:delay_enter=500000")


def _kills() -> list[Kill]:
    chance = Random(1)  # noqa: S311 -- a seed
    count = int(os.environ.get("VIRT_SSE_LEASH_KILLS", "0"))
    return FEW + [
        Kill("all", chance.randint(1, 600), chance.choice((1, 1, 2, 3)), chance.choice(VICTIMS))
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("bwrap", "setpriv", "prlimit", "unshare", "strace")


needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: other users may lack the right to make namespaces"
)


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("kill", _kills(), ids=str)
def test_no_process_is_left(tmp_path: Path, kill: Kill) -> None:
    stops = ("-e", f"inject={kill.call}:signal=STOP:when={kill.at}")
    with _traced(tmp_path / "image", stops) as (strace, leftovers):
        processes = _reach(kill, strace)
        os.kill(processes[min(VICTIMS.index(kill.victim), len(processes) - 1)], signal.SIGKILL)
        leftovers.check(meanwhile=lambda: _continue_all(leftovers))


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("victim", ["bwrap", "caller"])
def test_a_killed_bwrap_leaves_no_waiting_child(tmp_path: Path, victim: str) -> None:
    """bwrap's child waits until bwrap writes to an eventfd."""
    with _traced(tmp_path / "image", _SLOW_WRITES) as (strace, leftovers):
        found: list[int] = []

        def is_reached() -> bool:
            found[:] = _generations(strace)
            return [_name(pid) for pid in found[-2:]] == ["bwrap", "bwrap"]

        wait_until(is_reached, "bwrap has a child")
        os.kill(found[-2] if victim == "bwrap" else found[0], signal.SIGKILL)
        leftovers.check(seconds=10)


@contextlib.contextmanager
def _traced(image: Path, options: Sequence[str]) -> Iterator[tuple[int, Leftovers]]:
    """A process that runs a confined tool under strace with *options*: strace's process ID."""
    image.touch()
    trace = ["strace", "-f", "-qqq", "-o", os.devnull, *options, sys.executable, "-c", SCRIPT, str(image)]
    with Leftovers() as leftovers, subprocess.Popen(trace, stderr=subprocess.DEVNULL) as strace:
        try:
            yield strace.pid, leftovers
        finally:
            for pid in leftovers.found():
                _signal(pid, signal.SIGKILL)


def _reach(kill: Kill, strace: int) -> list[int]:
    """Wait for the moment of the kill: the generations of processes, from virt-sse on."""
    began, stops = time.monotonic(), 0
    steady: Counter[tuple[int, str]] = Counter()
    while time.monotonic() - began < 30:
        time.sleep(0.003)
        generations = _generations(strace)
        seen = {(pid, _state(pid)) for pid in generations[1:]}
        steady = Counter({each: steady[each] + 1 for each in seen})
        reached = [pid for (pid, state), samples in steady.items() if samples >= STEADY and state in "Tt"]
        stops += len(reached)
        if stops >= kill.stop or (len(generations) > 4 and not reached and _is_tool(generations[-1])):
            return generations
        for pid in {*reached, *(pid for pid in generations[:1] if _state(pid) in "Tt")}:
            _signal(pid, signal.SIGCONT)
            steady.pop((pid, _state(pid)), None)
    raise AssertionError(f"{kill}: neither stopped, nor does the tool run")


def _generations(pid: int) -> list[int]:
    """The child of a process, the child's child, and so on."""
    found = []
    with contextlib.suppress(OSError, IndexError):
        while True:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            found.append(pid)
    return found


def _is_tool(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b"/usr/bin/sleep\x0060\x00" and _state(pid) == "S"
    return False


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    return "X"


def _continue_all(leftovers: Leftovers) -> None:
    for pid in leftovers.found():
        if _state(pid) in "Tt":
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
