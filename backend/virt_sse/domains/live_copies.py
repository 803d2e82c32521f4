"""Copies of disks of running domains, with libvirt's block copy (virDomainBlockCopy).

The domain's QEMU copies a disk into the incomplete image of the copy, behind stages of its own if the copy
has two layers, and then keeps both alike. Once all copies of a domain have caught up, the guest is paused for
a moment, and the copies end: every copy has the content of the same point in time. An incremental copy, if a
dirty bitmap tells what changed, begins at that moment instead, and goes on beside the guest
(:mod:`.dirty_bitmaps`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.disks.copies import LiveCopied
from virt_sse.disks.creation import Unfinished
from virt_sse.domains import dirty_bitmaps
from virt_sse.domains.dirty_bitmaps import BitmapCopy, DiskNode
from virt_sse.domains.pause_locks import pause_locks
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    DiskInUseError,
    ImageFormatError,
    LibvirtError,
    LibvirtUnavailableError,
    MonitorError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_users, domains
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.disk_element import disk_element
from virt_sse.libvirt.guest_pause import end_pause, paused
from virt_sse.libvirt.secret_name import SecretName, plain_export
from virt_sse.libvirt.secrets import drop_secret, set_secret
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk
from virt_sse.model.layers import Placement
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.qemu import image_file, img, unlocking
from virt_sse.system.files import canonical
from virt_sse.system.marks import Marks
from virt_sse.system.progress import Progress

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_FLAGS = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB


class DomainCopies:
    """Copies disks of running domains, and ends copies left behind by killed commands.

    :ivar in_hook: whether libvirt may wait for this process: what killed commands left behind stays.
    """

    def __init__(self, host: Host, start: DomainStart, *, in_hook: bool = False) -> None:
        self._uri = host.config.libvirt_uri
        self._store = host.store_reads
        self.in_hook = in_hook
        self._stages = host.stages
        self._start = start
        self._paused = Marks(host.config.paused_domains)
        self._pauses = pause_locks(host.config)

    def domain_with(self, disk: Disk) -> str | None:
        """The name of the running domain with the disk; ``None`` without one, or if libvirt does not run."""
        try:
            with connected(self._uri) as connection:
                for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                    with domains.gone_is_fine():
                        if disk_users.uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk.id):
                            return str(domain.name())
        except LibvirtUnavailableError:
            pass  # QEMU's lock on the image shows whether a domain uses the disk
        return None

    def of_domain(self, domain: str) -> list[tuple[str, UUID]]:
        """Targets and ids of the disks of ours in a domain: if running, in the live definition.

        :raise LibvirtError: When no such domain exists.
        """
        with connected(self._uri) as connection:
            chains = domains.definition(domains.lookup(connection, domain)).disk_chains()
        links = [(chain.target, chain.links[chain.ours]) for chain in chains if chain.ours is not None]
        return [(target, link.disk_id) for target, link in links if link.disk_id and link.slot != TEMP_SLOT]

    def copy(
        self,
        domain: str,
        copies: Sequence[tuple[Disk, Unfinished]],
        *,
        quiesce: bool | None,
        progress: Progress,
    ) -> LiveCopied:
        """Copy disks of a running domain, all at the same point in time.

        :param copies: each disk, and the empty image to fill. The image of an incremental copy gets the
            changes if QEMU has the bitmap since the copy below, and else the whole content.
        :param quiesce: as of :meth:`Copies.copy`.
        :raise DiskInUseError: When a disk is being copied, e.g. by ``virsh blockcopy``, or has an overlay.
        :raise LibvirtError: When libvirt refuses, the domain ends, or QEMU cannot write a copy.
        :raise ImageFormatError: When QEMU has changed the header of a copy.
        """
        with connected(self._uri) as connection:
            found = domains.lookup(connection, domain)
            targets: list[str] = []
            increments: list[BitmapCopy] = []
            nodes: dict[UUID, str] = {}
            is_failed = True
            try:
                for disk, made in copies:
                    node = self._node_for_bitmaps(found, disk, made)
                    if node:
                        nodes[made.disk.id] = node.name
                    if node and made.disk.base_id in node.bitmaps:
                        increments.append(self._begin_increment(found, node, made))
                    else:
                        targets.append(self._begin(found, disk, made))
                _await(found, targets, _are_ready, progress)
                with self._pause(found, quiesce=quiesce) as began:
                    _await(found, targets, _are_in_sync, lambda _: None)
                    dirty_bitmaps.begin(found, nodes, increments)
                    for target in targets:
                        found.blockJobAbort(target, 0)  # a copy in sync is complete at its end
                pause = time.monotonic() - began
                changed = dirty_bitmaps.finish(found, increments, progress) if increments else {}
                is_failed = False
            finally:
                for _, made in copies:
                    self._end(connection, made.disk, is_failed=is_failed)
        for _, made in copies:  # the guest's QEMU, perhaps taken over, had the image
            headers = unlocking.validate(made.image, made.disk.format, made.deks[1:])
            if [header.cipher for header in headers] != [entry.cipher for entry in made.disk.deks]:
                raise ImageFormatError(f"the header of the copy {made.disk.name!r} was changed meanwhile")
            img.check_unlocks(made.image, made.disk.format, made.deks)
        return LiveCopied(pause, changed)

    def end(self, disk: Disk, image: Path) -> None:
        """End all that writes to the incomplete image of *disk*, left behind by a killed command.

        :raise DiskInUseError: When a QEMU process still has the image open.
        :raise LibvirtUnavailableError: In a hook.
        :raise VirtSseError: When a job or a process cannot be ended.
        """
        if not image.exists():
            return
        if self.in_hook:
            raise LibvirtUnavailableError(f"libvirt waits: the next command removes {image}")
        with contextlib.suppress(LibvirtError, MonitorError), connected(self._uri) as connection:
            self._end(connection, disk)
        self._stages.stop(disk.id)
        image_file.refuse_if_open(image)  # decides, whatever libvirt says

    def recover(self) -> None:
        """Resume the guests paused by killed commands; what libvirt refuses is logged, and tried again."""
        for domain_id in self._paused.all():
            try:
                with self._pauses.hold(domain_id):
                    with connected(self._uri) as connection:
                        found = domains.find(connection, domain_id)
                        if found is not None and domains.is_active(found):
                            end_pause(found)
                    self._paused.remove(domain_id)
            except (DiskInUseError, LibvirtUnavailableError):
                continue
            except LibvirtError as exc:
                _log.warning("domain %s, paused by a killed command, is resumed later: %s", domain_id, exc)

    def _node_for_bitmaps(self, domain: libvirt.virDomain, disk: Disk, made: Unfinished) -> DiskNode | None:
        """The node of a disk for the bitmap since a new copy; ``None`` if QEMU does not name it."""
        if made.disk.kind not in (DiskKind.SNAPSHOT, DiskKind.RESTORE_POINT):
            return None
        try:
            node = DiskNode.of(domain, _copied_chain(domain, disk).alias)
            dirty_bitmaps.prune(domain, node, self._store.with_ids(node.bitmaps), made.disk.base_id)
        except MonitorError as exc:
            _log.warning("QEMU keeps no dirty bitmap of disk %s: %s", disk.name, exc)
            return None
        return node

    def _begin_increment(self, domain: libvirt.virDomain, node: DiskNode, made: Unfinished) -> BitmapCopy:
        """Have a storage daemon open the image of an incremental copy, and QEMU connect to it."""
        assert made.disk.base_id is not None  # noqa: S101 -- of the caller
        copy = dataclasses.replace(made.disk, path=made.image)
        deks = {entry.slot: dek for entry, dek in zip(copy.deks, made.deks, strict=True)}
        definition = domains.definition(domain)
        qemu = definition.qemu_user or HostCapabilities.of(domain.connect()).qemu_user
        plan = self._start.plan(copy, Placement.STORAGE)
        self._stages.start(copy, plan, deks, domain_id=definition.uuid, domain=definition.name, qemu=qemu)
        increment = BitmapCopy(node.name, made.disk.base_id, copy.id)
        increment.connect(domain, canonical(self._stages.guest_socket(copy.id)), plain_export(copy.id))
        return increment

    def _begin(self, domain: libvirt.virDomain, disk: Disk, made: Unfinished) -> str:
        """Begin to copy a disk into the image of a copy.

        :return: the disk's name in the guest.
        """
        definition = domains.definition(domain)
        chain = _copied_chain(domain, disk)
        # The QEMU of a guest whose disk is decrypted below gets no key of the copy, either.
        placement = Placement.STORAGE if chain.links[0].slot is None else Placement.GUEST
        copy = dataclasses.replace(made.disk, path=made.image)
        deks = {entry.slot: dek for entry, dek in zip(copy.deks, made.deks, strict=True)}
        source = self._start.source(copy, placement)
        qemu = definition.qemu_user or HostCapabilities.of(domain.connect()).qemu_user
        plan = self._start.plan(copy, placement)
        self._stages.start(copy, plan, deks, domain_id=definition.uuid, domain=definition.name, qemu=qemu)
        if source.slot is not None:
            set_secret(domain.connect(), SecretName(copy.id, source.slot), deks[source.slot])
        domain.blockCopy(chain.target, disk_element(source, target=chain.target), flags=_FLAGS)
        return chain.target

    def _end(self, connection: libvirt.virConnect, disk: Disk, *, is_failed: bool = True) -> None:
        """End the jobs, the stages and the secrets of a copy, as far as there are any."""
        try:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with domains.gone_is_fine(or_ended=True):
                    self._end_jobs(domain, disk, is_failed=is_failed)
        finally:
            self._stages.stop(disk.id)
            for entry in disk.deks:
                drop_secret(connection, SecretName(disk.id, entry.slot))

    def _end_jobs(self, domain: libvirt.virDomain, disk: Disk, *, is_failed: bool) -> None:
        has_bitmap = disk.kind in (DiskKind.SNAPSHOT, DiskKind.RESTORE_POINT)
        for chain in domains.definition(domain).disk_chains():
            if any(link.disk_id == disk.id for link in chain.mirror):
                domain.blockJobAbort(chain.target, 0)
            if has_bitmap and chain.disk_id == disk.source_id:
                try:
                    dirty_bitmaps.end(domain, chain.alias, disk.id, is_failed=is_failed)
                except MonitorError:
                    if domains.is_active(domain):
                        raise

    @contextlib.contextmanager
    def _pause(self, domain: libvirt.virDomain, *, quiesce: bool | None) -> Iterator[float]:
        """Pause the guest during the block; a mark survives a kill.

        :return: when the pause began, in ``time.monotonic()``.
        """
        domain_id = UUID(domain.UUIDString())
        with self._pauses.hold(domain_id, wait=True):
            self._paused.add(domain_id)
            began = time.monotonic()
            with paused(domain, quiesce=quiesce):
                yield began
            self._paused.remove(domain_id)


def _copied_chain(domain: libvirt.virDomain, disk: Disk) -> DiskChain:
    """The images of a disk of a running domain.

    :raise DiskInUseError: When the disk is being copied or has an overlay.
    :raise LibvirtError: When the domain does not have the disk.
    """
    chains = domains.definition(domain).disk_chains()
    chain = next((each for each in chains if each.disk_id == disk.id), None)
    if chain is None:
        raise LibvirtError(f"domain {domain.name()!r} does not have disk {disk.name!r} any more")
    if chain.ours != 0:
        raise DiskInUseError(
            f"disk {disk.name!r} has an overlay, {chain.links[0].place}", hint="commit the overlay first"
        )
    if chain.mirror:
        raise DiskInUseError(f"disk {disk.name!r} is being copied to {chain.mirror[0].place}")
    return chain


def _await(
    domain: libvirt.virDomain,
    targets: Sequence[str],
    is_done: Callable[[libvirt.virDomain, Sequence[DiskChain]], bool],
    progress: Progress,
) -> None:
    """Wait for the copies of the disks *targets*.

    :raise LibvirtError: When a copy job has failed, or the domain has ended.
    """
    while True:
        chains = [chain for chain in domains.definition(domain).disk_chains() if chain.target in targets]
        if not domain.isActive():
            raise LibvirtError(f"domain {domain.name()!r} ended during the copy")
        for chain in chains:
            if not chain.mirror:
                raise LibvirtError(
                    f"QEMU gave up the copy of {chain.target}",
                    hint="is there room for the copy? See QEMU's log in /var/log/libvirt/qemu",
                )
        if is_done(domain, chains):
            return
        progress(_fraction(domain, targets))
        time.sleep(_POLL_SECONDS)


def _are_ready(_domain: libvirt.virDomain, chains: Sequence[DiskChain]) -> bool:
    return all(chain.mirror_ready for chain in chains)


def _are_in_sync(domain: libvirt.virDomain, chains: Sequence[DiskChain]) -> bool:
    """Whether nothing is left to copy, in a domain whose guest writes nothing."""
    jobs = [domain.blockJobInfo(chain.target, 0) for chain in chains]
    return all(job and job["cur"] == job["end"] for job in jobs)


def _fraction(domain: libvirt.virDomain, targets: Sequence[str]) -> float:
    jobs = [domain.blockJobInfo(target, 0) for target in targets]
    whole = sum(job["end"] for job in jobs if job)
    return sum(job["cur"] for job in jobs if job) / whole if whole else 0.0
