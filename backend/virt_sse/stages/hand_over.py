"""Hand-over of a disk between the storage daemons of two hosts, while the disk's guest migrates.

Run as a script by :mod:`~virt_sse.stages.hand_over_process`; as root, with the standard library and modules
of virt-sse that need no more. The process lives as long as the hand-over.

The guest's QEMU stays connected to the storage daemon of its host. The daemon's export has a node of its
own, ``exported``, with a single child: the disk's volume, or during a hand-over the node ``held``, an NBD
client of this process, which holds requests (:mod:`~virt_sse.qemu.held_requests`).

- ``viewing``, at the destination: QEMU reads the headers of the guest's volume when QEMU starts. The daemon
  has the image open read-only, and reads are passed on to this view. The view ends before the guest comes:
  the source still writes, so the daemon's metadata of the image becomes stale.
- ``leaving``, at the source: the guest's QEMU writes no more. The daemon closes the image.
- ``holding``, at either host: the first request for data tells that the guest runs on this host, because
  QEMU sends none for an inactive node. The agent tells so of a guest that sends none.
  Flushes are answered once the image is closed.
- ``taking``: once no QEMU process of any host has the image open, the daemon opens the image for writing.
- ``passing``: held requests are passed on to the volume, and the volume becomes the child of ``exported``.

The locks of the image decide: at most one daemon has the image open for writing, whatever fails. A request
waits as long as another daemon has the image. The image counts as in use all the time.

The arguments of the script are

1. the descriptor to write to once the process works;
2. the descriptor of the process's lock file;
3. the descriptor of the socket at which the storage daemon connects;
4. the path of the task, a JSON document (:class:`Task`). The process keeps the state in the document, for a
   process that replaces a killed one, and removes the document at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import FrameType

if __name__ == "__main__":
    sys.path.append(os.path.abspath(__file__).rpartition("/virt_sse/")[0])  # noqa: PTH100 -- pathlib loads slowly

from pathlib import Path

from virt_sse.errors import DiskInUseError, VirtSseError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.qemu import image_file
from virt_sse.qemu.daemon_monitor import PAUSE_SECONDS, DaemonMonitor, RefusedError
from virt_sse.qemu.held_requests import HeldRequests, ProtocolError
from virt_sse.system.files import write_private

VIEWING, LEAVING, HOLDING, TAKING, PASSING = "viewing", "leaving", "holding", "taking", "passing"
GO_ON = signal.SIGUSR1
"""Ends the view, or the wait for a request: the guest runs on this host."""

_HELD, _WAY = "held", "hand-over"
"""Node name of the client of this process, and the export for requests that this process passes on."""
_LONGEST_PAUSE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to hand over.

    :ivar monitor: socket of the storage daemon's monitor.
    :ivar nbd: socket of the storage daemon's NBD server.
    :ivar socket: socket of this process.
    :ivar export: id and name of the daemon's export for the guest.
    :ivar exported: its node, without a child.
    :ivar nodes: the nodes of the image and its volumes, outermost first, as for ``blockdev-add``.
    :ivar owner: user and group of the image.
    :ivar storage: user and group of the storage daemon.
    :ivar size: of the innermost volume in bytes; 0 if not yet known.
    """

    state: str
    monitor: str
    nbd: str
    socket: str
    export: dict[str, object]
    exported: dict[str, object]
    nodes: list[dict[str, object]]
    secrets: list[str]
    image: str
    format: str
    owner: tuple[int, int]
    storage: tuple[int, int]
    size: int = 0

    @property
    def volume(self) -> str:
        """Node name of the innermost volume."""
        return str(self.nodes[-1]["node-name"])


class HandOver:
    """A hand-over of a disk; runs in the main thread of the process.

    :param path: of the document with the task.
    :param listening: the socket at which the storage daemon connects.
    """

    def __init__(self, path: Path, listening: socket.socket) -> None:
        self._path = path
        self._task = Task(**json.loads(path.read_bytes()))
        self._listening = listening
        self._is_told = threading.Event()
        self._arrived = threading.Event()
        signal.signal(GO_ON, self._on_signal)

    def run(self, ready: int) -> None:
        """Hand over. Writes to *ready* once the process works.

        :raise RefusedError: When the storage daemon refuses a command that must not fail.
        :raise OSError: When the storage daemon ends.
        """
        began = self._task.state
        image = os.open(self._task.image, os.O_RDONLY | os.O_CLOEXEC)
        image_file.lock_for_guest(image)
        with DaemonMonitor(self._task.monitor) as monitor:
            if began == VIEWING:
                self._open_view(monitor)
            if not self._task.size:
                size = monitor.nodes()[self._task.volume]["image"]["virtual-size"]
                self._go_on(replace(self._task, size=size))
            held = HeldRequests(self._listening, self._task.size, self._arrived)
            if began == VIEWING:
                held.pass_on(self._task.nbd, _WAY)
            held.start()
            if began == VIEWING:
                self._connect(monitor)
            elif began == LEAVING:
                self._hold(monitor)
        os.write(ready, b"1")
        os.close(ready)
        if began == VIEWING:
            self._is_told.wait()
            held.hold()
            self._repeat(self._close_view)
        if began == VIEWING or (began == LEAVING and self._repeat(self._close, unless=self._arrived)):
            self._go_on(replace(self._task, state=HOLDING))
        if self._task.state in (HOLDING, TAKING):
            held.note_closed()
        if self._task.state in (LEAVING, HOLDING):
            self._arrived.wait()
            self._go_on(replace(self._task, state=TAKING))
        if self._task.state == TAKING:
            self._repeat(self._open)
            self._go_on(replace(self._task, state=PASSING))
        self._pass_on(held)
        self._path.unlink()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        (self._arrived if self._task.state == HOLDING else self._is_told).set()

    def _go_on(self, task: Task) -> None:
        self._task = task
        write_private(self._path, json.dumps(asdict(task)).encode())

    def _open_view(self, monitor: DaemonMonitor) -> None:
        """Open the image read-only, without locks: the source may write, and may open the image again."""
        for number, node in enumerate(self._task.nodes):
            read_only = {**node, "read-only": True, **({} if number else {"locking": "off"})}
            monitor.add(read_only | ({"force-share": True} if number else {}))
        monitor.export({"type": "nbd", "id": _WAY, "name": _WAY, "node-name": self._task.volume})

    def _connect(self, monitor: DaemonMonitor) -> None:
        """Let the daemon serve the guest's QEMU by this process."""
        monitor.add(self._held)
        monitor.add({**self._task.exported, "file": _HELD})
        monitor.export(self._task.export)

    def _hold(self, monitor: DaemonMonitor) -> None:
        monitor.add(self._held)
        try:
            self._put_below(monitor, _HELD)
        except RefusedError:
            monitor.remove(_HELD)
            raise

    def _close_view(self, monitor: DaemonMonitor) -> bool:
        monitor.unexport(_WAY)
        return self._close(monitor)

    def _close(self, monitor: DaemonMonitor) -> bool:
        """Close the image, and write what the daemon has in memory."""
        monitor.remove(*(str(node["node-name"]) for node in reversed(self._task.nodes)))
        return True

    @property
    def _held(self) -> dict[str, object]:
        return {
            "driver": "nbd",
            "node-name": _HELD,
            "server": {"type": "unix", "path": self._task.socket},
            "export": _WAY,
            "reconnect-delay": (1 << 32) - 1,  # until a process replaces this one, if killed
        }

    def _put_below(self, monitor: DaemonMonitor, name: str) -> None:
        """Make a node the child of the exported node. Requests under way are completed first."""
        monitor("blockdev-reopen", {"options": [{**self._task.exported, "file": name}]})

    def _repeat(
        self, attempt: Callable[[DaemonMonitor], bool], *, unless: threading.Event | None = None
    ) -> bool:
        """Repeat *attempt* until it succeeds, or the event *unless* happens; whether it succeeded."""
        complaint, pause = "", PAUSE_SECONDS
        while not (unless and unless.is_set()):
            try:
                with DaemonMonitor(self._task.monitor) as monitor:
                    if attempt(monitor):
                        return True
            except (RefusedError, VirtSseError) as error:
                if str(error) != complaint:
                    complaint = str(error)
                    os.write(2, f"{complaint}\n".encode())
            time.sleep(pause)
            pause = min(pause * 1.1, _LONGEST_PAUSE)
        return False

    def _pass_on(self, held: HeldRequests) -> None:
        """Pass held requests on, and take this process out of the way of the data."""
        with DaemonMonitor(self._task.monitor) as monitor:
            self._export_way(monitor)
            held.pass_on(self._task.nbd, _WAY)
            self._put_below(monitor, self._task.volume)
            monitor.remove(_HELD)
            monitor.unexport(_WAY)
            there = {each["name"] for each in monitor("qom-list", {"path": "/objects"})}
            for name in there.intersection(self._task.secrets):
                monitor("object-del", {"id": name})

    def _export_way(self, monitor: DaemonMonitor) -> None:
        way = {"type": "nbd", "id": _WAY, "name": _WAY, "node-name": self._task.volume, "writable": True}
        monitor.export(way)

    def _open(self, monitor: DaemonMonitor) -> bool:
        """Open the image for writing; whether no other process has the image.

        :raise RefusedError: When the daemon cannot open the image.
        :raise VirtSseError: When the image is missing, or its header is refused.
        """
        task = self._task
        if task.volume in monitor.nodes():
            return True  # by a killed process
        self._close(monitor)  # likewise
        with image_file.opened(Path(task.image), os.O_RDWR) as image:
            try:
                with image_file.sole_opener(Path(task.image), image):
                    image_file.luks_area(image, DiskFormat(task.format))
                    os.fchown(image, *task.storage)
                    try:
                        for node in task.nodes:
                            monitor.add(node)
                        self._export_way(monitor)  # QEMU locks a raw image for the export only
                    except RefusedError:
                        self._close(monitor)
                        raise
                    finally:
                        os.fchown(image, *task.owner)
            except DiskInUseError:
                return False
        return True


def main() -> None:
    ready, lock, listening = map(int, sys.argv[1:4])
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    HandOver(Path(sys.argv[4]), socket.socket(fileno=listening)).run(ready)


if __name__ == "__main__":
    try:
        main()
    except (OSError, RefusedError, ProtocolError, VirtSseError) as error:
        sys.exit(str(error))
