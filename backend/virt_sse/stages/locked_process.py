"""Processes that outlive the starting command, each identified by a lock held until the process ends.

A POSIX record lock (fcntl(2)) survives exec and ends with its process, also after a kill. F_GETLK returns the
holder's process id in the caller's PID namespace. A PID file, by contrast, can name an unrelated process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import StageError, ToolError
from virt_sse.libvirt.users import User
from virt_sse.stages import launch, seccomp
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.system.locks import holder

PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
_LOG_TAIL = 2000
_MOST_THREADS = 512
"""Of a process with a user of its own. A QEMU process has a pool of 64; nbdkit has 16 per connection."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run.

    :ivar arguments: the command line; may name *descriptors* by number.
    :ivar descriptors: descriptors for the program to inherit.
    :ivar listening: a listening socket for descriptor 3, announced by ``LISTEN_FDS`` (sd_listen_fds(3)).
    :ivar environment: environment variables to set, beside ``PATH``.
    :ivar readable: files that the program reads, beside its libraries.
    :ivar has_network: whether the program reaches the host's network, for an image in Ceph.
    """

    arguments: Sequence[str]
    descriptors: Sequence[int] = ()
    listening: int | None = None
    environment: Mapping[str, str] | None = None
    readable: Sequence[Path] = ()
    has_network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCommand:
    """A gate to start before a process; see :mod:`~virt_sse.stages.gate`.

    :ivar title: names the gate in messages.
    :ivar listening: descriptor of the socket at the path named in the domain.
    :ivar stage_socket: the socket at which the process listens.
    :ivar qemu_pid_file: libvirt's pid file of the domain's QEMU.
    """

    process: LockedProcess
    title: str
    listening: int
    stage_socket: Path
    qemu_pid_file: Path


class LockedProcess:
    """The process of a program.

    :param path: path without suffix of the ``.lock`` and ``.log`` files, in a folder of root's.
    """

    def __init__(self, path: Path) -> None:
        self._lock = path.with_name(path.name + ".lock")
        self._log = path.with_name(path.name + ".log")

    @property
    def log(self) -> str:
        """The end of the program's output, without line breaks."""
        return " ".join(self.output()[-_LOG_TAIL:].split())

    def output(self) -> str:
        """The program's output."""
        try:
            return self._log.read_bytes().decode(errors="replace")
        except OSError:
            return ""

    def start(
        self,
        command: Command,
        user: User,
        *,
        image: int | None = None,
        gated: int | None = None,
        gate: GateCommand | None = None,
        writable: Sequence[Path] = (),
        is_own_user: bool = False,
    ) -> None:
        """Start the program as *user*; the process must not run yet.

        The program has no network unless *command* says so, cannot start processes, and is limited in memory
        and in files. Without libseccomp the program starts without a seccomp filter; without Landlock, with
        all files of the user.

        :param image: the descriptor of an image to lock as QEMU does.
        :param gated: a listening socket of *command* that gets connections from a gate only.
        :param gate: the gate, if to be started as well.
        :param writable: the files and folders that the program may change.
        :param is_own_user: whether no other process has the user; the number of threads is limited then.
        :raise ToolError: When the program is not installed.
        :raise StageError: When the program cannot be started.
        """
        program = shutil.which(command.arguments[0])
        if program is None:
            raise ToolError(f"{command.arguments[0]} is not installed")
        given = [*command.descriptors, *(fd for fd in (command.listening, image) if fd is not None)]
        asked: dict[str, object] = {
            "image": image,
            "listening": command.listening,
            "gated": gated,
            "uid": user.uid,
            "gid": user.gid,
            "threads": _MOST_THREADS if is_own_user else None,
            "filter": _filter(has_network=command.has_network),
            "network": command.has_network,
            "readable": [program, *_libraries(program), *map(str, command.readable)],
            "writable": [str(path) for path in writable],
            "environment": dict(command.environment or {}),
            "command": [program, *command.arguments[1:]],
            "gate": None,
        }
        with contextlib.ExitStack() as files:
            if gate:
                lock, log = files.enter_context(gate.process._files(gate.title))
                given += [lock, log, gate.listening]
                asked["gate"] = {
                    "lock": lock,
                    "log": log,
                    "listening": gate.listening,
                    "stage_socket": str(gate.stage_socket),
                    "qemu_pid_file": str(gate.qemu_pid_file),
                }
            title = command.arguments[0]
            self.start_script(launch.__file__, [json.dumps(asked)], given, title=title, gate=gate)

    @contextlib.contextmanager
    def _files(self, title: str) -> Iterator[tuple[int, int]]:
        """Descriptors of the lock file, and of the empty log file."""
        with contextlib.ExitStack() as opened:
            try:
                lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
                opened.callback(os.close, lock)
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                log = os.open(self._log, flags, PRIVATE_FILE)
                opened.callback(os.close, log)
            except OSError as exc:
                raise StageError(f"cannot start {title}: {exc}") from exc
            yield lock, log

    def start_script(
        self,
        script: str,
        arguments: Sequence[str],
        descriptors: Sequence[int],
        *,
        title: str,
        gate: GateCommand | None = None,
    ) -> None:
        """Start a Python script that becomes the process; return once the script has reported itself ready.

        :param script: gets the descriptor to write to, the descriptor of the file to lock, and *arguments*;
            uses the standard library only.
        :param title: names the process in messages.
        :param gate: a gate that the script starts as well.
        :raise StageError: When the script cannot be started, or ends before it is ready.
        """
        with self._files(title) as (lock, log):
            ready, readied = os.pipe()
            try:
                subprocess.run(
                    [sys.executable, "-I", "-S", script, str(readied), str(lock), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[readied, lock, *descriptors],
                    check=False,
                )
                os.close(readied)
                readied = -1
                if not os.read(ready, 1):
                    if gate and (reason := gate.process.log):
                        raise StageError(f"cannot start {gate.title}: {reason}")
                    raise StageError(f"cannot start {title}: {self.log or 'no output'}")
            finally:
                for descriptor in (ready, readied):
                    if descriptor >= 0:
                        os.close(descriptor)

    def pid(self) -> int | None:
        """The process id; 0 for a process in another PID namespace; ``None`` if the process does not run."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return holder(descriptor)
        finally:
            os.close(descriptor)

    def stop(self, *, patience: float = PATIENCE) -> None:
        """End the process by SIGTERM, then SIGKILL; return when the process is gone.

        :param patience: seconds between the two signals.
        :raise StageError: When the process runs in another PID namespace.
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


def _libraries(program: str) -> list[str]:
    """The folders of a program's own libraries, e.g. /opt/qemu/lib."""
    prefix = Path(program).resolve().parent.parent
    return [str(prefix / name) for name in ("lib", "lib64", "share")]


def _filter(*, has_network: bool) -> str | None:
    """The seccomp filter in hexadecimal; ``None`` without libseccomp."""
    try:
        return seccomp.stage_filter(has_network=has_network).hex()
    except ToolError:
        return None


def _end(handle: int, patience: float) -> None:
    """Signal the process until the process is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        signal.pidfd_send_signal(handle, number)
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        if waiting.poll(patience * 1000):
            return
