"""Restarts dead stage processes and gates under running guests, and ends stage processes without a domain.

The libvirt hook starts and ends stage processes. The agent handles the cases without a hook: a process
died, or a domain ended while neither agent nor libvirtd ran.
"""

from __future__ import annotations

import logging
import time
from uuid import UUID

from virt_sse.agent import enforcement
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.snapshot_worker import SnapshotWorker
from virt_sse.domains.start import DomainStart
from virt_sse.errors import StageError, VirtSseError
from virt_sse.stages import Stages
from virt_sse.stages.gate_process import GATE
from virt_sse.stages.record import StageRecord
from virt_sse.stages.stages import LOST_WRITES

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 10.0


class StageWatch(SnapshotWorker[UUID]):
    """Keeps the stage processes of running domains' disks, by disk id."""

    def __init__(
        self, uri: str, stages: Stages, domains: DomainStart, metrics: Metrics, *, unused_seconds: float
    ) -> None:
        super().__init__("stage", unused_seconds)
        self._uri = uri
        self._stages = stages
        self._domains = domains
        self._metrics = metrics
        self._tried: dict[UUID, float] = {}
        self._lost: set[tuple[UUID, int]] = set()
        self._damaged: frozenset[str] = frozenset()
        self._refused: dict[UUID, list[str]] = {}

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Restart dead processes and gates, unless data is lost, and end unused processes.

        Does so once for each snapshot.
        """
        if not self._is_new(snapshot):
            return
        now = time.monotonic()
        running = {domain.uuid: domain for domain in snapshot.domains}
        unused = {}
        refused = {}
        damaged: list[StageError] = []
        for record in self._stages.records(damaged.append):
            domain = running.get(record.domain_id)
            if domain is None or all(use.disk_id != record.disk_id for use in domain.uses):
                unused[record.disk_id] = record
                continue
            refused[record.disk_id] = self._report_refused(record)
            if dead := self._stages.dead(record):
                self._revive(record, domain, dead, now)
            elif self._stages.lacks_gate(record) and self._is_due(record, now):
                self._pool.submit(self._restart_gate, record)
        self._report(damaged)
        self._refused = refused
        self._lost &= {(use.disk_id, domain.run) for domain in snapshot.domains for use in domain.uses}
        for disk_id in self._overdue(unused, now):
            del self._unused[disk_id]
            self._pool.submit(self._end, unused[disk_id])

    def _report(self, damaged: list[StageError]) -> None:
        """Log damaged records, each once."""
        messages = frozenset(map(str, damaged))
        for message in messages - self._damaged:
            _log.error("stage-record-damaged", extra=fields({"reason": message}))
        self._damaged = messages

    def _revive(self, record: StageRecord, domain: RunningDomain, dead: list[str], now: float) -> None:
        if not self._stages.may_restart(record):
            if (record.disk_id, domain.run) not in self._lost:
                self._lost.add((record.disk_id, domain.run))
                self._metrics.actions.labels("stage-lost").inc()
                _log.error("stage-lost", extra=fields(_details(record, dead) | {"reason": LOST_WRITES}))
        elif self._is_due(record, now):
            self._pool.submit(self._restart, record, domain, dead)

    def _is_due(self, record: StageRecord, now: float) -> bool:
        """Whether a restart for the disk is due; if so, the next restart is due later."""
        if self._tried.get(record.disk_id, 0.0) > now:
            return False
        self._tried[record.disk_id] = now + _AGAIN_SECONDS
        return True

    def _report_refused(self, record: StageRecord) -> list[str]:
        """Log the processes that were refused at the disk's socket, each once: all of them."""
        gate = self._stages.gate(record)
        refused = gate.refused() if gate else []
        for process in refused:
            if process not in self._refused.get(record.disk_id, []):
                details = {"disk": record.disk_id, "domain": record.domain, "reason": process}
                _log.warning("stage-client-refused", extra=fields(details))
        return refused

    def _restart(self, record: StageRecord, domain: RunningDomain, dead: list[str]) -> None:
        try:
            self._domains.restart_stages(record)
            went_on = enforcement.resume_after_error(self._uri, domain)
        except VirtSseError as exc:
            details = _details(record, dead) | {"reason": str(exc)}
            _log.warning("stage-not-restarted", extra=fields(details))
        else:
            self._metrics.actions.labels("restart-stage").inc()
            _log.info("stage-restarted", extra=fields(_details(record, dead) | {"resumed": went_on}))

    def _restart_gate(self, record: StageRecord) -> None:
        try:
            self._stages.restart_gate(record.disk_id)
        except VirtSseError as exc:
            details = _details(record, [GATE]) | {"reason": str(exc)}
            _log.warning("stage-not-restarted", extra=fields(details))
        else:
            self._metrics.actions.labels("restart-gate").inc()
            _log.info("gate-restarted", extra=fields(_details(record, [GATE])))

    def _end(self, record: StageRecord) -> None:
        """End unused processes. The domain may have started again since the snapshot: young ones stay."""
        try:
            spared = self._unused_seconds
            if self._stages.stop(record.disk_id, domain_id=record.domain_id, spared_seconds=spared):
                _log.info("stage-ended", extra=fields({"disk": record.disk_id}))
        except VirtSseError as exc:
            _log.warning("stage-not-ended", extra=fields({"disk": record.disk_id, "reason": str(exc)}))


def _details(record: StageRecord, dead: list[str]) -> dict[str, object]:
    return {"disk": record.disk_id, "domain": record.domain, "stages": dead}
