"""Automatic rotation: rewraps the disks of encryption sets for new versions of their keys."""

from __future__ import annotations

import logging
from uuid import UUID

from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.periodic_work import PeriodicWork
from virt_sse.backend import Backend
from virt_sse.errors import VirtSseError
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.system.progress import silent

_log = logging.getLogger(__name__)


class AutomaticRotation(PeriodicWork):
    """Checks for new key versions periodically.

    :param seconds: interval between checks.
    """

    def __init__(self, backend: Backend, metrics: Metrics, seconds: float) -> None:
        super().__init__("rotation", seconds, "rotation-failed")
        self._backend = backend
        self._metrics = metrics
        self._complete: set[UUID] = set()

    def _work(self) -> None:
        for encryption_set in self._backend.sets.all():
            if encryption_set.automatic_rotation and not self._stop.is_set():
                self._follow(encryption_set)

    def _follow(self, encryption_set: EncryptionSet) -> None:
        """Rewrap a set's disks if the key has a new version, or an earlier rewrap may be incomplete."""
        details: dict[str, object] = {"encryption-set": encryption_set.name}
        try:
            versions = self._backend.host.store.key_versions_in(encryption_set.id)
            if not versions:
                return
            wanted = self._backend.sets.wanted_key(encryption_set)
        except VirtSseError as exc:
            _log.warning("rotation-failed", extra=fields(details | {"reason": str(exc)}))
            return
        is_first = encryption_set.id not in self._complete
        if versions == {wanted} and not is_first:
            return
        # An image may also be older than the store without a mark: replaced by a copy from before a rotation.
        report = self._backend.keys.rewrap_disks(self._ours(encryption_set), silent, every_image=is_first)
        if report.failed:
            self._complete.discard(encryption_set.id)
            _log.warning("rotation-failed", extra=fields(details | {"failed": report.failed}))
        else:
            self._complete.add(encryption_set.id)
        if report.rewrapped:
            self._metrics.rewrapped.inc(report.rewrapped)
            _log.info("rotated", extra=fields(details | {"key": str(wanted), "disks": report.rewrapped}))

    def _ours(self, encryption_set: EncryptionSet) -> list[Disk]:
        """The disks that this host rewraps: in a shared store, those used here and in use on no other host.

        Each host has its own agent: a hundred hosts that all try all disks would refuse each other.
        """
        host = self._backend.host
        if not host.leases.are_shared:
            return host.store.in_set(encryption_set.id)
        ids = set(host.freshness.used_here()) - host.leases.held_elsewhere()
        return [disk for disk in host.store.with_ids(ids) if disk.set_id == encryption_set.id]
