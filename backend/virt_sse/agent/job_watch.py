"""Reports copies and backups of encrypted disks that began and ended between two polls.

QEMU's events tell that a job ran, and for which disk, but not the job's target. A job whose target no poll
has seen is reported: the target may be in plaintext.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.errors import InvalidValueError
from virt_sse.verification.chains import LinkKind

_log = logging.getLogger(__name__)

_JOB = re.compile(r"(copy|backup)-([a-z0-9]{1,20})-libvirt\b")
"""libvirt's ids of jobs with a target (``qemuBlockJobDiskNew``, ``qemuBackupDiskPrepareDataOne``)."""
_KINDS = {"copy": LinkKind.MIRROR, "backup": LinkKind.BACKUP}
_ENDED = frozenset({"aborting", "concluded", "null"})
_LAST = "null"
"""The status in the last event of a job."""
_OWN = timedelta(minutes=1)
"""virt-sse's own copies begin with a new disk in the store, and the job follows within this time."""


@dataclass(slots=True)
class _Job:
    """A job.

    :ivar is_seen: whether a poll has seen the target.
    :ivar is_settled: whether the job has ended and, if unseen, was reported.
    :ivar is_gone: whether the job's last event was received.
    :ivar polls: snapshots since the first event.
    """

    domain_id: UUID
    target: str
    kind: LinkKind
    began: datetime
    is_seen: bool = False
    is_ended: bool = False
    is_settled: bool = False
    is_gone: bool = False
    polls: int = 0


class JobWatch:
    """Follows jobs by their events and by the snapshots of the inventory.

    :param refresh: polls libvirt now.
    """

    def __init__(self, backend: Backend, metrics: Metrics, refresh: Callable[[], None]) -> None:
        self._backend = backend
        self._metrics = metrics
        self._refresh = refresh
        self._lock = threading.Lock()
        self._jobs: dict[tuple[UUID, str], _Job] = {}
        self._live: dict[UUID, set[str]] = {}
        self._seen = 0
        self._last: dict[UUID, RunningDomain] = {}

    def changed(self, domain_id: UUID, job: str, status: str) -> None:
        """Note the new status of a job; in any thread."""
        with self._lock:
            live = self._live.setdefault(domain_id, set())
            (live.discard if status == _LAST else live.add)(job)
        match = _JOB.match(job)
        if not match:
            return
        with self._lock:
            found = self._jobs.setdefault(
                (domain_id, job), _Job(domain_id, match[2], _KINDS[match[1]], datetime.now(UTC))
            )
            found.is_ended = found.is_ended or status in _ENDED
            found.is_gone = status == _LAST
        self._refresh()

    def forget(self) -> None:
        """Take no job for live: libvirt was away, and the ends of jobs are not known."""
        with self._lock:
            self._live.clear()

    def has_jobs(self, domain_id: UUID) -> bool:
        """Whether QEMU has reported a job of any kind, and not yet its end."""
        with self._lock:
            return bool(self._live.get(domain_id))

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Report the jobs that have ended unseen, once for each snapshot.

        :raise StoreError: When the store cannot be queried.
        """
        if snapshot.number == self._seen:
            return
        self._seen = snapshot.number
        running = {domain.uuid: domain for domain in snapshot.domains}
        domains = self._last | running
        self._last = running
        ended = []
        with self._lock:
            self._live = {domain_id: live for domain_id, live in self._live.items() if domain_id in running}
            for key, job in list(self._jobs.items()):
                domain = domains.get(job.domain_id)
                job.is_seen = job.is_seen or (domain is not None and _shows(domain, job))
                job.polls += 1
                has_ended = job.is_ended or (job.domain_id not in running and job.polls > 1)
                if has_ended and (domain is not None or job.polls > 1):
                    if not job.is_settled:
                        ended.append((job, domain))
                    job.is_settled = True
                    if job.is_gone or job.domain_id not in running:
                        del self._jobs[key]
        for job, domain in ended:
            if domain is not None and not job.is_seen:
                self._report(job, domain)

    def _report(self, job: _Job, domain: RunningDomain) -> None:
        disk_id = next((use.disk_id for use in domain.uses if use.target == job.target), None)
        if disk_id is None or self._is_own(disk_id, job.began):
            return
        self._metrics.unseen_copies.labels(job.kind.value).inc()
        details = {
            "domain": domain.name,
            "disk": disk_id,
            "target": job.target,
            "kind": job.kind.value,
            "reason": "the copy ended before its target was seen: look for an image in plaintext",
        }
        _log.warning("copy-unseen", extra=fields(details))

    def _is_own(self, disk_id: UUID, began: datetime) -> bool:
        """Whether a copy of the disk by virt-sse began together with the job."""
        made = self._backend.host.store.made_of(disk_id)
        return any(abs(disk.created - began) < _OWN for disk in made)


def _shows(domain: RunningDomain, job: _Job) -> bool:
    """Whether the definition of a domain shows the target of a job."""
    try:
        chains = domain.definition.disk_chains(domain.backup)
    except InvalidValueError:  # logged by the inventory
        return False
    return any(
        chain.target == job.target and (chain.mirror if job.kind is LinkKind.MIRROR else chain.backup)
        for chain in chains
    )
