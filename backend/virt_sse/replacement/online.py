"""The copy under a running guest: libvirt's block copy into the new disk, and the pivot of the domain.

The domain is paused for the pivot, and goes on once the store has the outcome. A kill of any process at any
moment therefore leaves one disk with all writes that the guest has seen completed: the source as long as the
domain does not use the new disk, and else the new disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from uuid import UUID

import libvirt

from virt_sse.domains.pause_locks import pause_locks
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    CopyCancelledError,
    CopyInterruptedError,
    DiskStateError,
    ImageError,
    LibvirtError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.block_copy import COPY_JOB, BlockCopy
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.disk_element import disk_element
from virt_sse.libvirt.secrets import drop_secrets_of
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disks import Disk
from virt_sse.model.layers import GuestNode
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.replacement.pivot import check_target
from virt_sse.system.progress import Progress

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LIBVIRT_AWAY_SECONDS = 60.0
"""Time for a restart of libvirtd during a copy."""
_CATCH_UP_SECONDS, _CATCH_UP_POLL_SECONDS = 5.0, 0.01
_NO_ROOM = 1 << 20


class OnlineCopy:
    """The block copy of a record's domain.

    :param stopping: set to leave a copy to the next process, without undoing the copy.
    """

    def __init__(
        self, host: Host, start: DomainStart, copy: Replacement, stopping: threading.Event | None = None
    ) -> None:
        assert copy.domain_id is not None  # noqa: S101 -- of the caller
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._stages = host.stages
        self._pauses = pause_locks(host.config)
        self._start = start
        self._copy = copy
        self._domain_id: UUID = copy.domain_id
        self._stopping = stopping or threading.Event()

    def run(self, progress: Progress) -> float:
        """Copy, verify and pivot; the new disk has then taken over.

        :return: how long the guest was paused, in seconds.
        :raise CopyCancelledError: When the copy is to be undone.
        :raise CopyInterruptedError: When this process stops; QEMU continues.
        :raise VirtSseError: By meaning, when the copy has failed.
        """
        new = self._store.get(str(self._copy.disk_id))
        with self._connection() as domain:
            chain = BlockCopy(domain, self._copy.target).chain()
            if chain is None or not _writes_to(chain, new.id):
                self._begin(domain, new)
        self._await_ready(new, progress)
        with self._connection() as domain:
            return self._pivot(domain, new)

    def has_pivoted(self) -> bool | None:
        """Whether the running domain uses the new disk; ``None`` without a running domain.

        :raise LibvirtError: When libvirt fails.
        """
        with self._connection() as domain:
            if not domains.is_active(domain):
                return None
            chain = BlockCopy(domain, self._copy.target).chain()
            return chain is not None and chain.links[0].disk_id == self._copy.disk_id
        return None

    def abort(self) -> None:
        """End the block copy, and take back what the domain got for the new disk; the domain may be gone.

        :raise LibvirtError: When libvirt fails.
        """
        with connected(self._uri) as connection:
            domain = domains.find(connection, self._domain_id)
            if domain is not None and domains.is_active(domain):
                with domains.gone_is_fine(or_ended=True):
                    job = BlockCopy(domain, self._copy.target)
                    if (chain := job.chain()) and _writes_to(chain, self._copy.disk_id):
                        job.abort()
            self._take_back(connection, self._copy.disk_id)

    def take_back_source(self) -> None:
        """Take back what the domain got for the source disk; the domain may be gone.

        :raise LibvirtError: When libvirt fails.
        """
        if self._copy.source_id is not None:
            with connected(self._uri) as connection:
                self._take_back(connection, self._copy.source_id)

    def resume_guest(self) -> None:
        """Resume the domain if a killed process has left the domain paused for the pivot.

        :raise LibvirtError: When libvirt fails.
        """
        with (
            self._pauses.hold(self._domain_id, wait=True),
            self._connection() as domain,
            domains.gone_is_fine(or_ended=True),
        ):
            if domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]:
                domain.resume()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[libvirt.virDomain]:
        """The domain; an undefined domain raises :class:`VmStateError`."""
        with connected(self._uri) as connection:
            domain = domains.find(connection, self._domain_id)
            if domain is None:
                raise VmStateError(f"the domain of disk {self._copy.name!r} no longer exists")
            yield domain

    def _begin(self, domain: libvirt.virDomain, new: Disk) -> None:
        for disk in (new, *self._store.with_ids([self._copy.source_id] if self._copy.source_id else [])):
            self._guest_slot(disk)
        source = self._start.source(new)
        use = source.use(self._copy.target)
        self._start.serve(domain.connect(), domains.definition(domain), [use])
        element = disk_element(source, target=self._copy.target)
        BlockCopy(domain, self._copy.target).start(element, max_rate=self._copy.max_rate)

    def _await_ready(self, new: Disk, progress: Progress) -> None:
        lost_at: float | None = None
        while True:
            self._refuse_to_go_on()
            try:
                with self._connection() as domain:
                    job = BlockCopy(domain, self._copy.target)
                    if (chain := job.chain()) is None or not _writes_to(chain, new.id):
                        raise self._failure(new)
                    if chain.mirror_ready:
                        progress(1.0)
                        return
                    if found := job.progress():
                        progress(found.fraction)
                lost_at = None
            except LibvirtError:  # libvirtd is restarted, or fails for good
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _LIBVIRT_AWAY_SECONDS:
                    raise
            self._stopping.wait(_POLL_SECONDS)

    def _refuse_to_go_on(self) -> None:
        if self._stopping.is_set():
            raise CopyInterruptedError(f"the copy of disk {self._copy.name!r} goes on without this process")
        record = self._store.replacements.find(self._copy.disk_id)
        if record is None or record.is_cancelled:
            raise CopyCancelledError(f"the copy of disk {self._copy.name!r} was cancelled")

    def _failure(self, new: Disk) -> ImageError:
        room = os.statvfs(new.path.parent)
        if room.f_bavail * room.f_frsize < _NO_ROOM:
            return ImageError(f"cannot write {new.path}: no space left on device")
        return ImageError(
            f"QEMU has ended the copy into {new.path}",
            hint=f"the reason is in the log of the domain; disk {self._copy.name!r} is as before",
        )

    def _pivot(self, domain: libvirt.virDomain, new: Disk) -> float:
        (cipher,) = [entry.cipher for entry in new.deks if entry.slot == self._guest_slot(new)]
        check_target(domain, self._start.source(new).place, cipher)
        job = BlockCopy(domain, self._copy.target)
        self._catch_up(job)
        with self._pauses.hold(self._domain_id, wait=True):
            return self._pivot_paused(domain, new, job, cipher)

    def _pivot_paused(self, domain: libvirt.virDomain, new: Disk, job: BlockCopy, cipher: Cipher) -> float:
        place = self._start.source(new).place
        was_running = domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        if was_running:
            self._store.replacements.set_state(self._copy, ReplacementState.PIVOTING)
        began = time.monotonic()
        try:
            if was_running:
                domain.suspend()
            job.pivot()
            chain = job.chain()
            if chain is None or chain.links[0].disk_id != new.id:
                raise ImageError(f"the domain does not use {new.path} after the pivot")
            check_target(domain, place, cipher, alias=chain.alias)
            self._store.replacements.take_over(self._copy)
        finally:
            if was_running:
                with contextlib.suppress(libvirt.libvirtError):
                    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                        domain.resume()
        return time.monotonic() - began if was_running else 0.0

    def _catch_up(self, job: BlockCopy) -> None:
        """Wait a while for a moment without writes on their way, so that the pause of the guest is short."""
        if self._copy.max_rate is not None:
            job.lift_limit()
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        while time.monotonic() < deadline:
            found = job.progress()
            if found is None or found.done == found.end:
                return
            time.sleep(_CATCH_UP_POLL_SECONDS)

    def _guest_slot(self, disk: Disk) -> str:
        """Slot of the DEK for the guest's QEMU.

        :raise DiskStateError: When the set's placement keeps all DEKs out of the guest's QEMU.
        """
        guest = self._start.plan(disk).stages[0]
        if not isinstance(guest, GuestNode):
            raise DiskStateError(
                f"disk {self._copy.name!r} has, or would have, its keys outside of the guest's QEMU",
                hint="such a disk is copied while its domain is stopped",
            )
        return guest.slot

    def _take_back(self, connection: libvirt.virConnect, disk_id: UUID) -> None:
        """Remove secrets and stages of a disk that the domain does not use."""
        drop_secrets_of(connection, disk_id)
        self._stages.stop(disk_id, domain_id=self._domain_id)


def _writes_to(chain: DiskChain, new_id: UUID) -> bool:
    """Whether QEMU copies the disk into the new disk."""
    return chain.mirror_job == COPY_JOB and any(link.disk_id == new_id for link in chain.mirror)
