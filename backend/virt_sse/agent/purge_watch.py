"""Purges deleted disks once their retention time is over."""

from __future__ import annotations

import logging
import time

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.snapshot_worker import SingleWorker
from virt_sse.disks.soft_deletion import SoftDeletion

_log = logging.getLogger(__name__)


class PurgeWatch(SingleWorker):
    """Purges in a thread of its own, because the storage of a disk may hang. No domain uses a deleted disk.

    :param seconds: interval.
    """

    def __init__(self, soft_deletion: SoftDeletion, metrics: Metrics, seconds: float) -> None:
        super().__init__("purge")
        self._soft_deletion = soft_deletion
        self._metrics = metrics
        self._seconds = seconds
        self._not_before = 0.0
        self._reported: dict[str, str] = {}

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Purge what is due, once in each interval."""
        if time.monotonic() >= self._not_before and snapshot.number:
            self._not_before = time.monotonic() + self._seconds
            self.submit(snapshot.number, self._purge)

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
