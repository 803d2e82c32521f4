"""The process of a gate: starts and ends the gate of a disk's NBD socket, and reads the gate's reports."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import StageError
from virt_sse.stages import gate, sockets
from virt_sse.stages.locked_process import GateCommand, LockedProcess
from virt_sse.stages.sockets import ListeningSocket

GATE = "gate"
"""Names the gate's lock and log files."""
_TITLE = "the gate of the NBD socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateProcess:
    """The gate before the stage process next to a guest; see :mod:`~virt_sse.stages.gate`.

    :ivar folder: private folder, root's, of the disk's stage processes.
    :ivar guest: the socket named in the domain.
    :ivar qemu_pid_file: libvirt's pid file of the domain's QEMU.
    """

    folder: Path
    guest: ListeningSocket
    qemu_pid_file: Path

    @property
    def process(self) -> LockedProcess:
        return LockedProcess(self.folder / GATE)

    @contextlib.contextmanager
    def command(self) -> Iterator[GateCommand]:
        """The gate to be started along with the stage process; a former gate is ended first.

        :raise OSError: When the socket cannot be made.
        """
        self.process.stop()
        with sockets.listening(self.guest) as listening:
            yield GateCommand(
                process=self.process,
                title=_TITLE,
                listening=listening,
                stage_socket=sockets.gated_socket(self.folder),
                qemu_pid_file=self.qemu_pid_file,
            )

    def start(self, stage: LockedProcess) -> None:
        """Start the gate before the running process *stage*; a former gate is ended first.

        :raise StageError: When the process has ended, or the gate cannot be started.
        :raise OSError: When the socket cannot be made.
        """
        self.process.stop()
        pid = stage.pid()
        if not pid:
            raise StageError("the process has ended, or runs in another PID namespace")
        with sockets.listening(self.guest) as listening:
            stage_socket = sockets.gated_socket(self.folder)
            arguments = [str(each) for each in (listening, pid, stage_socket, self.qemu_pid_file)]
            self.process.start_script(gate.__file__, arguments, [listening], title=_TITLE)

    def refused(self) -> list[str]:
        """The processes that were refused, in words: pid, user and program; each once.

        Other messages of the gate are included: they end the gate.
        """
        return self.process.output().splitlines()


def admitted_by(folder: Path) -> Path | None:
    """libvirt's pid file of the QEMU that the running gate in *folder* admits, by the gate's command line."""
    pid = LockedProcess(folder / GATE).pid()
    if not pid:
        return None
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:  # ended since
        return None
    last = os.fsdecode(arguments[-1])
    if last.startswith("{"):  # of the script that starts the stage process; the gate is a fork
        last = json.loads(last)["gate"]["qemu_pid_file"]
    return Path(last)
