"""Purges deleted disks once their retention time is over."""

from __future__ import annotations

import logging

from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.periodic_work import PeriodicWork
from virt_sse.disks.soft_deletion import SoftDeletion

_log = logging.getLogger(__name__)


class PurgeWatch(PeriodicWork):
    """Purges periodically. Works without libvirt: no domain starts with a deleted disk.

    :param seconds: interval.
    """

    def __init__(self, soft_deletion: SoftDeletion, metrics: Metrics, seconds: float) -> None:
        super().__init__("purge", seconds, "watch-failed", {"watch": "purge"})
        self._soft_deletion = soft_deletion
        self._metrics = metrics
        self._reported: dict[str, str] = {}

    def _work(self) -> None:
        done, failed = self._soft_deletion.purge_due()
        for disk in done:
            _log.info("disk-purged", extra=fields({"disk": disk.name, "path": str(disk.path)}))
        for name, reason in failed.items():
            if self._reported.get(name) != reason:
                _log.warning("purge-failed", extra=fields({"disk": name, "reason": reason}))
        self._reported = failed
        self._metrics.deleted_disks.set(len(self._soft_deletion.all()))
        self._metrics.overdue_purges.set(len(failed))
