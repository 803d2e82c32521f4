"""The processes between QEMU and the storage: there for domains that run, and for no others.

The hook sees to that. Here is seen to what no hook was run for: one that died under a running guest,
and those of a domain that ended while nobody was there.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from virt_sse.agent import enforcement
from virt_sse.agent.inventory import RunningDomain, Snapshot
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.domains.start import DomainStart
from virt_sse.errors import VirtSseError
from virt_sse.stages import Stages
from virt_sse.stages.record import StageRecord

_log = logging.getLogger(__name__)

_THREADS = 4
_AGAIN_SECONDS = 10.0


class StageWatch:
    """:param unused_seconds: how long stages must have been of no use before they are ended: a command starts
    them a little before the domain has the disk.
    """

    def __init__(
        self, uri: str, stages: Stages, domains: DomainStart, metrics: Metrics, *, unused_seconds: float
    ) -> None:
        self._uri = uri
        self._stages = stages
        self._domains = domains
        self._metrics = metrics
        self._unused_seconds = unused_seconds
        self._unused: dict[UUID, float] = {}
        self._tried: dict[UUID, float] = {}
        self._lost: set[tuple[UUID, int]] = set()
        self._seen = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stage")

    def keep(self, snapshot: Snapshot) -> None:
        """Start what died and can be started again, end what no domain uses; once for each snapshot."""
        if snapshot.number == self._seen:
            return
        self._seen = snapshot.number
        now = time.monotonic()
        running = {domain.uuid: domain for domain in snapshot.domains}
        unused = {}
        for record in self._stages.records():
            domain = running.get(record.domain_id)
            if domain is None or all(use.disk_id != record.disk_id for use in domain.uses):
                unused[record.disk_id] = record
            elif dead := self._stages.dead(record):
                self._revive(record, domain, dead, now)
        self._lost &= {(use.disk_id, domain.run) for domain in snapshot.domains for use in domain.uses}
        for disk_id in self._unused.keys() - unused.keys():
            del self._unused[disk_id]
        for disk_id, record in unused.items():
            if self._unused.setdefault(disk_id, now) <= now - self._unused_seconds:
                del self._unused[disk_id]
                self._pool.submit(self._end, record)

    def stop(self) -> None:
        """Begin nothing any more, and wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)

    def _revive(self, record: StageRecord, domain: RunningDomain, dead: list[str], now: float) -> None:
        if not record.keeps_all:
            if (record.disk_id, domain.run) not in self._lost:
                self._lost.add((record.disk_id, domain.run))
                self._metrics.actions.labels("stage-lost").inc()
                reason = "what it had not flushed is lost: the domain must be stopped and started"
                _log.error("stage-lost", extra=fields(_told(record, dead) | {"reason": reason}))
        elif self._tried.get(record.disk_id, 0.0) <= now:
            self._tried[record.disk_id] = now + _AGAIN_SECONDS
            self._pool.submit(self._restart, record, domain, dead)

    def _restart(self, record: StageRecord, domain: RunningDomain, dead: list[str]) -> None:
        try:
            self._domains.restart_stages(record)
            went_on = enforcement.resume_after_error(self._uri, domain)
        except VirtSseError as exc:
            _log.warning("stage-not-restarted", extra=fields(_told(record, dead) | {"reason": str(exc)}))
        else:
            self._metrics.actions.labels("restart-stage").inc()
            _log.info("stage-restarted", extra=fields(_told(record, dead) | {"resumed": went_on}))

    def _end(self, record: StageRecord) -> None:
        try:
            self._stages.stop(record.disk_id, domain_id=record.domain_id)
        except VirtSseError as exc:
            _log.warning("stage-not-ended", extra=fields({"disk": record.disk_id, "reason": str(exc)}))
        else:
            _log.info("stage-ended", extra=fields({"disk": record.disk_id}))


def _told(record: StageRecord, dead: list[str]) -> dict[str, object]:
    return {"disk": record.disk_id, "domain": record.domain, "stages": dead}
