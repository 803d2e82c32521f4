"""Hands the disks of domains that migrate to another host over, and replaces killed processes of hand-overs.

libvirt runs no hook at the source before the end of a migration. QEMU's event tells that the source's QEMU
has given up writing; a poll finds the domain if the event was missed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import libvirt

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields
from virt_sse.domains.start import DomainStart
from virt_sse.errors import VirtSseError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domains import find, leaves
from virt_sse.stages import Stages
from virt_sse.stages.hand_overs import HandOvers
from virt_sse.stages.record import StageRecord

_log = logging.getLogger(__name__)

_THREADS = 8
_SETTLED_SECONDS = 2.0
"""A guest that runs and sends no request gets its disks back after this time."""
_LEAVE_SECONDS, _PAUSE_SECONDS = 60.0, 0.05
_LEFT = frozenset({"completed", "postcopy-active"})
"""QEMU ``MigrationStatus``: the guest's processors do not run at the source any more."""


class HandOverWatch:
    """Hands disks over, in threads of its own."""

    def __init__(self, uri: str, stages: Stages, domains: DomainStart) -> None:
        self._uri = uri
        self._stages = stages
        self._hand_overs = HandOvers(stages)
        self._domains = domains
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="hand-over")
        self._seen = 0
        self._paused: Set[UUID] = frozenset()
        self._leaving: set[UUID] = set()
        self._lock = threading.Lock()
        self._ends = threading.Event()

    def migrated(self, domain_id: UUID, status: str) -> None:
        """Note the new status of a migration, at its source or destination; in any thread."""
        if status in _LEFT:
            self._pool.submit(self._leave, domain_id)

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Hand over what no event has told, and replace killed processes; once for each snapshot."""
        if snapshot.number == self._seen:
            return
        self._seen = snapshot.number
        running = {domain.uuid for domain in snapshot.domains if domain.runs}
        for record in self._stages.records():
            if self._hand_overs.is_dead(record):
                self._pool.submit(self._restart, record)
            elif record.domain_id in running:
                self._hand_overs.take(record, before=snapshot.time - _SETTLED_SECONDS)
        before, self._paused = self._paused, {domain.uuid for domain in snapshot.domains if domain.leaves}
        for domain_id in before & self._paused:  # the first time, QEMU may still write
            self._pool.submit(self._leave, domain_id)

    def stop(self) -> None:
        """Start no more work, and wait for work under way."""
        self._ends.set()
        self._pool.shutdown(cancel_futures=True)

    def _leave(self, domain_id: UUID) -> None:
        """Hand over the disks of a domain."""
        for record in self._stages.records():
            if record.domain_id == domain_id:
                with self._lock:
                    is_new = record.disk_id not in self._leaving
                    self._leaving.add(record.disk_id)
                if is_new:
                    self._pool.submit(self._leave_disk, record)

    def _leave_disk(self, record: StageRecord) -> None:
        """Hand a disk over, and again if a late request takes the image back."""
        details: dict[str, object] = {"disk": record.disk_id, "domain": record.domain}
        ends = time.monotonic() + _LEAVE_SECONDS
        try:
            with connected(self._uri) as connection:
                has_begun = False
                while time.monotonic() < ends and self._is_leaving(connection, record.domain_id):
                    if self._domains.leave_disk(record):
                        if has_begun:
                            _log.info("disk-handed-over", extra=fields(details))
                        break
                    has_begun = True
                    if self._ends.wait(_PAUSE_SECONDS):
                        break
        except VirtSseError as exc:
            _log.warning("disk-not-handed-over", extra=fields(details | {"reason": str(exc)}))
        finally:
            with self._lock:
                self._leaving.discard(record.disk_id)

    @staticmethod
    def _is_leaving(connection: libvirt.virConnect, domain_id: UUID) -> bool:
        """Whether a domain does not run any more; false after its migration to this host."""
        domain = find(connection, domain_id)
        return domain is not None and leaves(domain)

    def _restart(self, record: StageRecord) -> None:
        details: dict[str, object] = {"disk": record.disk_id, "domain": record.domain}
        try:
            if self._hand_overs.restart(record.disk_id):
                _log.info("hand-over-restarted", extra=fields(details))
        except VirtSseError as exc:
            _log.warning("hand-over-not-restarted", extra=fields(details | {"reason": str(exc)}))
