"""libvirt's secrets: there for domains that run, and for no others.

The hook sees to that. Here is seen to what no hook was run for: libvirtd lost its secrets and could not be
given them again at once, or a domain ended while nobody was there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from virt_sse.agent.inventory import RunningDomain, Snapshot
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.domains.start import DomainStart
from virt_sse.errors import LibvirtError, VirtSseError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.references import parse_usage
from virt_sse.libvirt.secrets import drop_secret

_log = logging.getLogger(__name__)

_THREADS = 4
_AGAIN_SECONDS = 30.0


class SecretKeeper:
    """:param unused_seconds: how long a secret must have been of no use before it is dropped: a command sets
    it a little before the domain has the disk.
    """

    def __init__(self, uri: str, domains: DomainStart, metrics: Metrics, *, unused_seconds: float) -> None:
        self._uri = uri
        self._domains = domains
        self._metrics = metrics
        self._unused_seconds = unused_seconds
        self._unused: dict[str, float] = {}
        self._tried: dict[tuple[UUID, int], float] = {}
        self._lock = threading.Lock()
        self._seen = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="secret")

    def expect(self, usages: Collection[str]) -> None:
        """These are about to be set: they are not dropped now."""
        with self._lock:
            for usage in usages:
                self._unused.pop(usage, None)

    def keep(self, snapshot: Snapshot, is_revoked: Callable[[RunningDomain], bool]) -> None:
        """Restore what running domains lack, and drop what none of them has; once for each snapshot."""
        if snapshot.number == self._seen:
            return
        self._seen = snapshot.number
        now = time.monotonic()
        present = {(domain.uuid, domain.run) for domain in snapshot.domains}
        for gone in self._tried.keys() - present:
            del self._tried[gone]
        for domain in snapshot.domains:
            key = (domain.uuid, domain.run)
            if domain.usages <= snapshot.secrets or is_revoked(domain):
                self._tried[key] = now  # it has them, or must not have them; later is soon enough
            elif key not in self._tried:
                self._tried[key] = now  # perhaps it was just being started
            elif now >= self._tried[key]:
                self._tried[key] = now + _AGAIN_SECONDS
                self._pool.submit(self._restore, domain)
        used = frozenset().union(*(domain.usages for domain in snapshot.domains))
        unused = snapshot.secrets - used
        with self._lock:
            for usage in self._unused.keys() - unused:
                del self._unused[usage]
            overdue = [
                usage for usage in unused if self._unused.setdefault(usage, now) <= now - self._unused_seconds
            ]
        if overdue:
            self._pool.submit(self._drop, overdue)

    def stop(self) -> None:
        """Begin nothing any more, and wait for what is under way."""
        self._pool.shutdown(cancel_futures=True)

    def _restore(self, domain: RunningDomain) -> None:
        try:
            self._domains.restore(domain.name, domain.xml)
        except VirtSseError as exc:
            if isinstance(exc, LibvirtError):  # a libvirtd that comes or goes; the next one is asked soon
                self._tried[domain.uuid, domain.run] = time.monotonic()
            _log.warning("secrets-not-restored", extra=fields({"domain": domain.name, "reason": str(exc)}))
        else:
            self._metrics.actions.labels("restore-secrets").inc()
            _log.info("secrets-restored", extra=fields({"domain": domain.name}))

    def _drop(self, usages: Collection[str]) -> None:
        try:
            with connected(self._uri) as connection:
                for usage in usages:
                    reference = parse_usage(usage)
                    with self._lock:
                        if reference and self._unused.pop(usage, None) is not None:
                            drop_secret(connection, *reference)
                            _log.info("secret-dropped", extra=fields({"usage": usage}))
        except (VirtSseError, ValueError) as exc:
            _log.warning("secrets-not-dropped", extra=fields({"reason": str(exc)}))
