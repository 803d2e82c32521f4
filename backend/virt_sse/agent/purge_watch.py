"""Purges deleted disks once their retention time is over."""

from __future__ import annotations

import logging
import threading

from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.disks.soft_deletion import SoftDeletion
from virt_sse.errors import VirtSseError

_log = logging.getLogger(__name__)


class PurgeWatch:
    """Purges periodically, in a separate thread: the storage of a disk may hang.

    Works without libvirt: no domain starts with a deleted disk.

    :param seconds: interval.
    """

    def __init__(self, soft_deletion: SoftDeletion, metrics: Metrics, seconds: float) -> None:
        self._soft_deletion = soft_deletion
        self._metrics = metrics
        self._seconds = seconds
        self._stop = threading.Event()
        self._reported: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="purge", daemon=True)

    def start(self) -> None:
        """Start to purge."""
        self._thread.start()

    def stop(self) -> None:
        """Stop. A purge under way may be interrupted: the next command finishes the purge."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._purge()
            except VirtSseError as exc:
                _log.warning("watch-failed", extra=fields({"watch": "purge", "reason": str(exc)}))
            except Exception:  # noqa: BLE001 -- the next round tries again
                _log.exception("watch-failed")
            self._stop.wait(self._seconds)

    def _purge(self) -> None:
        done, failed = self._soft_deletion.purge_due()
        for disk in done:
            _log.info("disk-purged", extra=fields({"disk": disk.name, "path": str(disk.path)}))
        for name, reason in failed.items():
            if self._reported.get(name) != reason:
                _log.warning("purge-failed", extra=fields({"disk": name, "reason": reason}))
        self._reported = failed
        self._metrics.deleted_disks.set(len(self._soft_deletion.all()))
        self._metrics.overdue_purges.set(len(failed))
