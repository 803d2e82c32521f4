"""The process that hands a disk over between two hosts: started, told to go on, replaced if killed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from virt_sse.errors import StageError
from virt_sse.model.keys import Dek
from virt_sse.qemu import storage_daemon
from virt_sse.qemu.storage_daemon import StorageDaemon
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages import hand_over, sockets
from virt_sse.stages.hand_over import Task
from virt_sse.stages.locked_process import LockedProcess
from virt_sse.stages.record import StageRecord
from virt_sse.stages.sockets import ListeningSocket
from virt_sse.stages.stage_process import ImageSource
from virt_sse.stages.storage_daemon import StorageDaemonProcess
from virt_sse.system.files import write_private

HAND_OVER = "hand-over"
"""Names the process's files and socket."""
_TITLE = "the hand-over of a disk"
_HOLDS_SECONDS, _POLL_SECONDS = 10.0, 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverProcess:
    """The hand-over of a disk by the storage daemon next to its image; see :mod:`~virt_sse.stages.hand_over`.

    :ivar folder: private folder, root's, of the disk's stage processes.
    :ivar listening: the socket at which the storage daemon connects.
    """

    record: StageRecord
    daemon: StorageDaemonProcess
    folder: Path
    listening: ListeningSocket

    @property
    def process(self) -> LockedProcess:
        return LockedProcess(self.folder / HAND_OVER)

    @property
    def state(self) -> str | None:
        """The state of a hand-over that has begun and has not ended."""
        try:
            return str(json.loads(self._path.read_bytes())["state"])
        except FileNotFoundError:
            return None

    @property
    def has_image_closed(self) -> bool:
        """Whether the storage daemon has no data to write: it does not have the image open for writing."""
        return self.state in (hand_over.VIEWING, hand_over.HOLDING, hand_over.TAKING)

    @property
    def is_dead(self) -> bool:
        """Whether the process has died before the end of the hand-over."""
        return self.state is not None and self.process.pid() is None

    def begin(self, state: str, deks: Sequence[Dek], base: BaseImage | None = None) -> None:
        """Begin a hand-over; return once its process works.

        :param state: ``viewing`` at the destination, with a storage daemon that has nothing open; ``leaving``
            at the source.
        :param deks: of the storage daemon's volumes, innermost first.
        :param base: the image below a linked clone, for a daemon that has nothing open.
        :raise StageError: When the process cannot be started.
        :raise MonitorError: When the storage daemon fails.
        :raise OSError: When a file or socket cannot be made.
        """
        source, place = self.daemon.place.source, self.daemon.place
        if not isinstance(source, ImageSource):
            raise StageError("a disk with a host cache cannot be handed over")
        monitor = StorageDaemon(place.folder / "qmp")
        task = Task(
            state=state,
            monitor=str(monitor.monitor),
            nbd=str(place.served.path),
            socket=str(self.listening.path),
            export=storage_daemon.export_of(place.export),
            exported=dict(storage_daemon.EXPORTED),
            nodes=storage_daemon.image_nodes(
                source.path, place.format, len(deks), has_base=place.base is not None
            ),
            secrets=monitor.lend(deks, base),
            image=str(source.path),
            format=place.format.value,
            owner=(self.record.owner.uid, self.record.owner.gid),
            storage=(place.user.uid, place.user.gid),
        )
        write_private(self._path, json.dumps(asdict(task)).encode())
        try:
            self.start()
        except BaseException:
            self._path.unlink()
            raise

    def start(self) -> None:
        """Start the process, or replace a killed one.

        :raise StageError: When the process cannot be started.
        :raise OSError: When the socket cannot be made.
        """
        with sockets.listening(self.listening) as listening:
            arguments = [str(listening), str(self._path)]
            self.process.start_script(hand_over.__file__, arguments, [listening], title=_TITLE)

    def take(self, *, before: float) -> None:
        """Have the storage daemon open the image although the guest, which runs here, has sent no request.

        :param before: only if requests are held since then, of ``time.time()``.
        """
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the hand-over has ended
            is_due = self.state == hand_over.HOLDING and self._path.stat().st_mtime < before
            if is_due and (pid := self.process.pid()):
                os.kill(pid, hand_over.GO_ON)

    def begin_holding(self) -> None:
        """End the view of the image at the destination; return once all requests are held.

        :raise StageError: When the process has ended.
        """
        deadline = time.monotonic() + _HOLDS_SECONDS
        if pid := self.process.pid():
            os.kill(pid, hand_over.GO_ON)
            while time.monotonic() < deadline:
                if self.state != hand_over.VIEWING:
                    return
                time.sleep(_POLL_SECONDS)
        raise StageError(f"{_TITLE} has failed: {self.process.log or 'no process'}")

    def forget(self) -> None:
        """Forget a hand-over whose processes have ended."""
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / f"{HAND_OVER}.json"
