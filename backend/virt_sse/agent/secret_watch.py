"""Restores missing libvirt secrets of running domains, and drops libvirt secrets without a domain.

The libvirt hook sets and drops the secrets. The agent handles the cases without a hook: libvirtd lost its
secrets and the hook could not set them again, or a domain ended while neither agent nor libvirtd ran.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.snapshot_worker import SnapshotWorker
from virt_sse.domains.start import DomainStart
from virt_sse.errors import LibvirtError, VirtSseError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secret

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 30.0


class SecretWatch(SnapshotWorker[str]):
    """Keeps the libvirt secrets of running domains, by usage id."""

    def __init__(self, uri: str, domains: DomainStart, metrics: Metrics, *, unused_seconds: float) -> None:
        super().__init__("secret", unused_seconds)
        self._uri = uri
        self._domains = domains
        self._metrics = metrics
        self._tried: dict[tuple[UUID, int], float] = {}

    def keep(self, snapshot: InventorySnapshot, is_revoked: Callable[[RunningDomain], bool]) -> None:
        """Restore missing secrets of running domains, and drop unused secrets; once for each snapshot."""
        if not self._is_new(snapshot):
            return
        now = time.monotonic()
        present = {(domain.uuid, domain.run) for domain in snapshot.domains}
        for gone in self._tried.keys() - present:
            del self._tried[gone]
        for domain in snapshot.domains:
            key = (domain.uuid, domain.run)
            if domain.usages <= snapshot.secrets or is_revoked(domain):
                self._tried[key] = now  # complete, or revoked: a later check is soon enough
            elif key not in self._tried:
                self._tried[key] = now  # the domain may be starting just now
            elif now >= self._tried[key]:
                self._tried[key] = now + _AGAIN_SECONDS
                self._pool.submit(self._restore, domain)
        used = frozenset().union(*(domain.usages for domain in snapshot.domains))
        if overdue := self._overdue(snapshot.secrets - used, now):
            self._pool.submit(self._drop, overdue)

    def _restore(self, domain: RunningDomain) -> None:
        try:
            self._domains.restore(domain.definition)
        except VirtSseError as exc:
            if isinstance(exc, LibvirtError):  # libvirtd is starting or stopping: try again soon
                self._tried[domain.uuid, domain.run] = time.monotonic()
            _log.warning("secrets-not-restored", extra=fields({"domain": domain.name, "reason": str(exc)}))
        else:
            self._metrics.actions.labels("restore-secrets").inc()
            _log.info("secrets-restored", extra=fields({"domain": domain.name}))

    def _drop(self, usages: Collection[str]) -> None:
        """Drop unused secrets. A domain may be starting with one, set since the snapshot: young ones stay."""
        spared = self._unused_seconds
        try:
            with connected(self._uri) as connection:
                for usage in usages:
                    name = SecretName.parse(usage)
                    with self._lock:
                        is_unused = self._unused.pop(usage, None) is not None
                    if name and is_unused and drop_secret(connection, name, spared_seconds=spared):
                        _log.info("secret-dropped", extra=fields({"usage": usage}))
        except (VirtSseError, ValueError) as exc:
            _log.warning("secrets-not-dropped", extra=fields({"reason": str(exc)}))
