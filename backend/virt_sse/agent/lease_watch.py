"""Leases in agreement with the running domains of this host; renewed as long as the host is alive."""

from __future__ import annotations

import logging
import threading
import time
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.errors import HostFencedError, VirtSseError
from virt_sse.keys.leases import Leases
from virt_sse.model.disks import DiskState

_log = logging.getLogger(__name__)

_RENEW_SECONDS = 10.0
"""Well below :data:`virt_sse.model.hosts.SILENT_SECONDS`."""

_START_SECONDS = 120
"""A lease of a domain that does not run is kept for this time: the domain may be about to start."""


class LeaseWatch:
    """Renews, takes and gives back leases. Does nothing without a shared store."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._due = 0.0
        self._reported: set[str] = set()
        self._lock = threading.Lock()
        self._ended: dict[UUID, int] = {}

    def note_end(self, domain_id: UUID, snapshot_number: int) -> None:
        """Take no lease for a domain that ends now, although older snapshots show the domain.

        Call before the domain's leases are given back; in any thread.

        :param snapshot_number: of the newest snapshot; the next one may have begun before the end.
        """
        if self._leases.are_shared:
            with self._lock:
                self._ended[domain_id] = snapshot_number + 1

    def keep(self, snapshot: InventorySnapshot, *, is_current: bool) -> None:
        """Renew the leases, if due; failures are logged. For a single thread.

        :param is_current: whether the snapshot shows the running domains: libvirt answers.
        """
        if not self._leases.are_shared or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _RENEW_SECONDS
        problems: set[str] = set()
        try:
            self._leases.renew()
            self._leases.end_killed_work()
            if is_current:
                problems = self._compare(snapshot)
        except HostFencedError as exc:
            problems = {str(exc)}
        except VirtSseError as exc:
            _log.warning("leases-not-renewed", extra=fields({"reason": str(exc)}))
            return
        for problem in problems - self._reported:
            _log.error("lease-conflict", extra=fields({"reason": problem}))
        self._reported = problems

    def _compare(self, snapshot: InventorySnapshot) -> set[str]:
        """Give unused leases back, and take missing ones. Returns the conflicts with other hosts."""
        wanted = {
            domain.uuid: {use.disk_id for use in domain.uses} | {domain.uuid} for domain in snapshot.domains
        }
        with self._lock:
            self._ended = {id_: number for id_, number in self._ended.items() if number >= snapshot.number}
        taken: dict[UUID, set[UUID]] = {}
        for use in self._leases.uses():
            taken.setdefault(use.user_id, set()).add(use.resource_id)
            is_used = use.resource_id in wanted.get(use.user_id, ())
            seconds = use.seconds - (time.time() - snapshot.time)  # at the snapshot
            if not is_used and use.user_id != self._leases.identity.id and seconds > _START_SECONDS:
                self._leases.end(use.user_id, [use.resource_id])
        problems = set()
        for domain in snapshot.domains:
            missing = wanted[domain.uuid] - taken.get(domain.uuid, set()) - {domain.uuid}
            for disk_id in missing:
                try:
                    self._take(domain, disk_id, snapshot.number)
                except VirtSseError as exc:
                    problems.add(f"domain {domain.name}: {exc}")
        return problems

    def _take(self, domain: RunningDomain, disk_id: UUID, snapshot_number: int) -> None:
        """Take a missing lease, unless the domain has ended since the snapshot.

        :raise VirtSseError: By meaning.
        """
        with self._lock:
            if self._ended.get(domain.uuid, 0) >= snapshot_number:
                return
            with self._leases.starting(domain.uuid, [disk_id], states=list(DiskState)):
                _log.info("lease-taken", extra=fields({"disk": disk_id, "domain": domain.name}))
