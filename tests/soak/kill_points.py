"""Moments at which SIGKILL ends a command: after a time, or before the n-th system call that changes files.

Works for any argument vector, also inside a lab host's namespaces: timeout(1) or strace(1) kills the command,
and runs on the inside, too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random

CALLS = (
    "write,pwrite64,writev,pwritev,sendto,sendmsg,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,"
    "unlinkat,mkdir,rmdir,ftruncate,fallocate,chmod,fchmod,chown,fchown,clone,vfork"
)
"""System calls that change files, or ask another process to. ``clone`` and ``vfork`` begin tools."""

KILLED = (-9, 137)
"""Exit statuses of a killed command: subprocess's, and the one of timeout(1) and nsenter(1)."""
_ENDED_AT_THE_TIME = 124
"""Exit status of timeout(1) when the command ended by itself just then."""
_SECONDS = 600

Vector = Sequence[str | Path]
Wrap = Callable[[Vector], list[str]]
"""Wraps an argument vector, e.g. to enter a lab host's namespaces."""


class KillBy(Enum):
    """The way of a kill.

    :cvar TIME: after a time.
    :cvar CALL: before the n-th call of the command's main thread.
    :cvar ANY_CALL: before the n-th call of any thread, and of any tool run by the command.
    """

    TIME = "time"
    CALL = "call"
    ANY_CALL = "any-call"


@dataclass(frozen=True, slots=True)
class Measured:
    """An operation that ran undisturbed.

    :ivar begins: seconds from the start to the first call.
    :ivar ends: seconds from the start to the end.
    :ivar calls: the names of the calls of the main thread, in order.
    """

    begins: float
    ends: float
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KillPoint:
    """The moment of a kill.

    :ivar at: seconds, or the number of the call among those of the same name, from 1.
    :ivar call: name of the call, if any.
    """

    by: KillBy
    at: float
    call: str = ""

    def __str__(self) -> str:
        return f"{self.by.value}={self.call}{':' if self.call else ''}{self.at:g}"

    @classmethod
    def parse(cls, text: str) -> KillPoint:
        """Read what ``str`` wrote.

        :raise ValueError: When *text* is no kill point.
        """
        by, _, moment = text.partition("=")
        call, _, at = moment.rpartition(":")
        return cls(KillBy(by), float(at), call)

    @classmethod
    def choose(cls, chance: Random, measured: Measured) -> KillPoint:
        """A random moment: half by call, a quarter by call of any process, a quarter by time."""
        by = chance.choice((KillBy.CALL, KillBy.CALL, KillBy.ANY_CALL, KillBy.TIME))
        if by is KillBy.TIME:
            return cls(by, round(chance.uniform(measured.begins, measured.ends), 3))
        position = chance.randrange(len(measured.calls))
        call = measured.calls[position]
        return cls(by, measured.calls[: position + 1].count(call), call)

    def around(self, command: Vector) -> list[str]:
        """The argument vector that runs *command* up to the kill."""
        if self.by is KillBy.TIME:
            return ["timeout", "--foreground", "-s", "KILL", f"{self.at:g}", *map(str, command)]
        everything = ["-f", "--seccomp-bpf"] if self.by is KillBy.ANY_CALL else []
        return ["strace", *everything, "-qqq", "-o", "/dev/null", *self.injection(), *map(str, command)]

    def injection(self) -> list[str]:
        """The options of strace that kill before the call."""
        return ["-e", f"inject={self.call}:signal=KILL:when={int(self.at)}"]


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    status: int
    output: str

    @property
    def killed(self) -> bool:
        """Whether the command was killed; otherwise the command was faster, or a tool was killed."""
        return self.status in KILLED


def run(command: Vector, *, environment: dict[str, str], wrap: Wrap | None = None) -> Ended:
    """Run *command* to its end.

    :raise subprocess.TimeoutExpired: When the command hangs.
    """
    vector = wrap(command) if wrap else [str(part) for part in command]
    done = subprocess.run(
        vector,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_SECONDS,
    )
    status = 0 if done.returncode == _ENDED_AT_THE_TIME else done.returncode
    return Ended(status, done.stdout)


def measure(
    command: Vector, trace: Path, *, environment: dict[str, str], wrap: Wrap | None = None
) -> tuple[Measured, Ended]:
    """Run *command* undisturbed.

    :param trace: a file for strace.
    """
    # ``exit_group`` marks the end, and ``execve`` the begin.
    expression = f"trace={CALLS},execve,exit_group"
    vector = ["strace", "-ttt", "-o", trace, "-e", expression, *map(str, command)]
    ended = run(vector, environment=environment, wrap=wrap)
    times = [
        (float(found[1]), found[2])
        for line in trace.read_text(errors="replace").splitlines()
        if (found := re.match(r"([0-9.]+) (\w+)", line))
    ]
    began, last = times[0][0], times[-1][0]
    calls = [(time, name) for time, name in times if name not in ("execve", "exit_group")]
    names = tuple(name for _, name in calls)
    return Measured(calls[0][0] - began, last - began, names), ended
