"""Disks that have received their content: the domain that migrated here has arrived."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from uuid import UUID

import libvirt

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.domains.received_disks import ReceivedDisks
from virt_sse.errors import VirtSseError

_log = logging.getLogger(__name__)


class ReceivedWatch:
    """Makes the received disks of arrived domains ready, in a thread of its own: libvirt may wait for a hook.

    No hook runs when a guest arrives. libvirt continues the guest once the content of its disks is complete.
    """

    def __init__(self, received: ReceivedDisks) -> None:
        self._received = received
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="received")
        self._jobs: dict[UUID, Future[None]] = {}

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Complete the migrations of the domains in *snapshot*; failures are logged, and tried again."""
        self._jobs = {domain_id: job for domain_id, job in self._jobs.items() if not job.done()}
        for domain in snapshot.domains:
            is_new = domain.has_guest and domain.uuid not in self._jobs
            if is_new and self._received.due(domain.definition):
                self._jobs[domain.uuid] = self._pool.submit(self._complete, domain)

    def stop(self) -> None:
        """Begin no further work."""
        self._pool.shutdown(cancel_futures=True)

    def _complete(self, domain: RunningDomain) -> None:
        details: dict[str, object] = {"domain": domain.name}
        try:
            self._received.complete(domain.definition)
        except (VirtSseError, libvirt.libvirtError) as exc:
            _log.warning("disks-not-received", extra=fields(details | {"reason": str(exc)}))
        except Exception:  # noqa: BLE001 -- an unexpected failure must not end the watch
            _log.exception("disks-not-received", extra=fields(details))
        else:
            _log.info("disks-received", extra=fields(details))
