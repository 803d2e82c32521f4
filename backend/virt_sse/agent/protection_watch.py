"""Keeps the store in step with the definitions of this host's protected domains."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import libvirt

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields
from virt_sse.domains.protection import DomainProtection
from virt_sse.errors import VirtSseError
from virt_sse.keys.host import Host
from virt_sse.libvirt.connection import connected

_log = logging.getLogger(__name__)


class ProtectionWatch:
    """Follows the protected domains in a thread of its own. Does nothing without a shared store.

    :param seconds: interval between two looks.
    """

    def __init__(self, host: Host, seconds: float) -> None:
        self._host = host
        self._protection = DomainProtection(host)
        self._pool = ThreadPoolExecutor(1, "protection")
        self._seconds = seconds
        self._due = 0.0
        self._reported: set[str] = set()

    def stop(self) -> None:
        """Wait for the work under way."""
        self._pool.shutdown(cancel_futures=True)

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Look at the protected domains, if due; call with each snapshot. Failures are logged."""
        if self._host.leases.are_shared and snapshot.number and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds
            self._pool.submit(self._follow)

    def _follow(self) -> None:
        try:
            with connected(self._host.config.libvirt_uri) as connection:
                problems = {name: str(reason) for name, reason in self._protection.follow(connection)}
        except (VirtSseError, libvirt.libvirtError) as exc:
            _log.warning("protection-failed", extra=fields({"reason": str(exc)}))
            return
        for name in problems.keys() - self._reported:
            _log.warning("domain-not-kept", extra=fields({"domain": name, "reason": problems[name]}))
        self._reported = set(problems)
