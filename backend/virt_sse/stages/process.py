"""Processes that outlive the command that starts them, each known by the lock that it holds.

A POSIX record lock (fcntl(2)) survives exec and ends with its process, however that ends; who asks for it is
told the holder's process id, in his own PID namespace. So there is no file with a number in it that may be
another process's by now.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import StageError, ToolError
from virt_sse.libvirt.users import User
from virt_sse.stages import launch
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.system.locks import holder

_KILL_AFTER_SECONDS = 5.0
_LOG_TAIL = 2000


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run.

    :ivar arguments: with the descriptors of *descriptors* by their numbers.
    :ivar descriptors: what it inherits.
    :ivar listening: a listening socket that it is handed as descriptor 3, by ``LISTEN_FDS``
        (sd_listen_fds(3)).
    :ivar environment: what is set, beside ``PATH``.
    """

    arguments: Sequence[str]
    descriptors: Sequence[int] = ()
    listening: int | None = None
    environment: Mapping[str, str] | None = None


class Process:
    """One program; *path* without a suffix names its ``.lock`` and its ``.log``, in a folder of root's."""

    def __init__(self, path: Path) -> None:
        self._lock = path.with_name(path.name + ".lock")
        self._log = path.with_name(path.name + ".log")

    @property
    def log(self) -> str:
        """The end of what it has said, in one line."""
        try:
            text = self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
        except OSError:
            return ""
        return " ".join(text.split())

    def start(self, command: Command, user: User, *, image: int | None = None) -> None:
        """Start the program, which must not run, as *user*.

        :param image: the descriptor of an image to lock as QEMU would.
        :raise ToolError: When the program is not installed.
        :raise StageError: When it cannot be started.
        """
        program = shutil.which(command.arguments[0])
        if program is None:
            raise ToolError(f"{command.arguments[0]} is not installed")
        try:
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
        except OSError as exc:
            raise StageError(f"cannot start {command.arguments[0]}: {exc}") from exc
        ready, readied = os.pipe()
        given = [*command.descriptors, *(fd for fd in (command.listening, image) if fd is not None)]
        asked = {
            "ready": readied,
            "lock": lock,
            "image": image,
            "listening": command.listening,
            "uid": user.uid,
            "gid": user.gid,
            "environment": dict(command.environment or {}),
            "command": [program, *command.arguments[1:]],
        }
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", launch.__file__, json.dumps(asked)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[readied, lock, *given],
                check=False,
            )
            os.close(readied)
            readied = -1
            if not os.read(ready, 1):
                raise StageError(f"cannot start {command.arguments[0]}: {self.log or 'it says nothing'}")
        finally:
            for descriptor in (ready, readied, lock, log):
                if descriptor >= 0:
                    os.close(descriptor)

    def pid(self) -> int | None:
        """The process's id here; 0 when it cannot be seen from here; ``None`` when it does not run."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return holder(descriptor)
        finally:
            os.close(descriptor)

    def stop(self, *, patience: float = _KILL_AFTER_SECONDS) -> None:
        """End it, in good order if it can; done when it is gone. Nothing when it does not run.

        :param patience: for how many seconds it may end in good order, before it is killed.
        :raise StageError: When it cannot be reached from here.
        """
        while (pid := self.pid()) is not None:
            if pid <= 0:
                raise StageError(f"the process of {self._lock.stem} runs in another PID namespace")
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if self.pid() != pid:
                    continue
                _end(handle, patience)
            except ProcessLookupError:
                continue
            finally:
                os.close(handle)


def _end(handle: int, patience: float) -> None:
    """Signal the process until it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal.pidfd_send_signal(handle, number)
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        if waiting.poll(patience * 1000):
            return
