"""Stores the sizes of disks that others resized under running guests, e.g. ``virsh blockresize``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from uuid import UUID

import libvirt

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.snapshot_worker import SingleWorker
from virt_sse.backend import Backend
from virt_sse.errors import InvalidValueError, VirtSseError
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.model.disks import Disk, DiskState
from virt_sse.verification.monitor import block_graph
from virt_sse.verification.running_disks import RunningDisks

_log = logging.getLogger(__name__)

_FLAGS = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
"""Without the sizes of domains that libvirt is at work on: the next snapshot has the sizes."""


class SizeWatch(SingleWorker):
    """Asks libvirt for the sizes of the running domains' disks, in a thread of its own.

    :param has_jobs: whether QEMU has a block job in a domain. Such a domain is asked later: QEMU 7.2 crashes
        if the end of a job changes the block graph while QEMU answers ``query-named-block-nodes``.
    """

    def __init__(self, backend: Backend, has_jobs: Callable[[UUID], bool]) -> None:
        super().__init__("size")
        self._has_jobs = has_jobs
        self._backend = backend
        self._uri = backend.host.config.libvirt_uri

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Compare the sizes, once for each snapshot."""
        self.submit(snapshot.number, self._compare, snapshot.domains)

    def _compare(self, running: Sequence[RunningDomain]) -> None:
        ids = {use.disk_id for domain in running for use in domain.uses}
        if not ids:
            return
        known = {disk.id: disk for disk in self._backend.disks.with_ids(ids) if disk.state is DiskState.READY}
        with connected(self._uri) as connection:
            for domain in running:
                if self._has_jobs(domain.uuid):
                    continue
                with domains.gone_is_fine(or_ended=True):
                    found = connection.lookupByUUID(domain.uuid.bytes)
                    self._compare_domain(domain, found, known)

    def _compare_domain(
        self, domain: RunningDomain, found: libvirt.virDomain, known: Mapping[UUID, Disk]
    ) -> None:
        sizes = _sizes(found)
        for target, disk_id in _own_images(domain):
            disk, size = known.get(disk_id), sizes.get(target)
            if disk is None or size is None or size == disk.size:
                continue
            self._backend.host.store.set_size(disk.id, size)
            details = {"disk": disk.name, "domain": domain.name, "from": disk.size, "to": size}
            _log.info("disk-resized", extra=fields(details))
            place = self._backend.host.stages.guest_socket(disk.id)
            try:
                problem = RunningDisks(block_graph(found), (), None).beyond_room(place)
            except VirtSseError as exc:
                problem = f"the room for the disk cannot be told: {exc}"
            if problem:
                _log.error("disk-beyond-room", extra=fields(details | {"reason": problem}))


def _sizes(domain: libvirt.virDomain) -> dict[str, int]:
    """The sizes of a running domain's disks in bytes, by their names in the guest."""
    found = {}
    for _, stats in domain.connect().domainListGetStats([domain], libvirt.VIR_DOMAIN_STATS_BLOCK, _FLAGS):
        for number in range(stats.get("block.count", 0)):
            name, size = stats.get(f"block.{number}.name"), stats.get(f"block.{number}.capacity")
            if name is not None and size is not None:
                found[str(name)] = int(size)
    return found


def _own_images(domain: RunningDomain) -> Iterator[tuple[str, UUID]]:
    """The disks of ours without an overlay: the name in the guest, and the id."""
    try:
        for chain in domain.definition.disk_chains():
            if chain.disk_id is not None and chain.ours == 0:
                yield chain.target, chain.disk_id
    except InvalidValueError:  # logged by the inventory
        return
