"""Starts domains which the libvirt hook refused because libvirtd was not serving clients yet."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import libvirt

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.config import Config
from virt_sse.domains.deferred_starts import DeferredStarts
from virt_sse.errors import LibvirtError
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 30.0
_MOST_ATTEMPTS = 20
"""A key vault may start later than this host. After ten minutes, an operator has to start the domain."""


class DeferredStart:
    """Starts the domains noted in :class:`DeferredStarts`, in a thread of its own.

    Only domains still marked for autostart are started.
    """

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._uri = config.libvirt_uri
        self._metrics = metrics
        self._deferred = DeferredStarts(config)
        self._pool = ThreadPoolExecutor(1, "deferred-start")
        self._attempts: dict[UUID, tuple[int, float]] = {}

    def stop(self) -> None:
        """Start no more domains, and wait for a start under way."""
        self._pool.shutdown(cancel_futures=True)

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Start the noted domains, once libvirt has answered; call with each snapshot."""
        if not snapshot.number:
            return
        now = time.monotonic()
        for domain_id in self._deferred.all():
            count, due = self._attempts.get(domain_id, (0, 0.0))
            if now >= due:
                self._attempts[domain_id] = (count + 1, now + _AGAIN_SECONDS)
                self._pool.submit(self._start, domain_id, is_last=count + 1 >= _MOST_ATTEMPTS)

    def _start(self, domain_id: UUID, *, is_last: bool) -> None:
        details = {"domain-id": str(domain_id)}
        try:
            with connected(self._uri) as connection:
                domain = domains.find(connection, domain_id)
                if domain is not None and domain.autostart() and not domains.is_active(domain):
                    details["domain"] = domain.name()
                    domain.create()
                    self._metrics.actions.labels("autostart").inc()
                    _log.info("domain-autostarted", extra=fields(details))
        except (LibvirtError, libvirt.libvirtError) as exc:
            self._metrics.failed_actions.labels("autostart").inc()
            _log.warning("domain-not-autostarted", extra=fields(details | {"reason": str(exc)}))
            if not is_last:
                return
        self._deferred.remove(domain_id)
        self._attempts.pop(domain_id, None)
