"""The outcome of copies: finished or undone, also after a kill of the process at work.

A re-encryption makes a new disk, with DEKs and an image of its own, copies the data, and puts the new disk in
place of the old disk, which is then crypto-erased. The order of writes:

1. The record of the copy; the source becomes ``copying``.
2. The new disk, by :mod:`virt_sse.disks.creation`.
3. The data: under a running guest by QEMU (:mod:`.online`), else by confined tools (:mod:`.offline`).
4. The outcome, in one transaction of the store: the new disk has the name, the source is ``deleting``.
5. The source is erased, the image of the new disk gets its final path, definitions of domains are rewritten,
   the record is removed. Each part can be repeated.

A copy cut off before step 4 is undone, unless the domain already uses the new disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt

from virt_sse.disks.lifecycle import Disks
from virt_sse.domains.replacement_outcome import has_new_disk
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    CopyInterruptedError,
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    ImageError,
    VirtSseError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DiskSource
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.model.disks import DiskState
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.qemu import envelope_slots, image_file
from virt_sse.replacement.online import OnlineCopy
from virt_sse.replacement.plain_disks import is_image
from virt_sse.system.files import publish

_log = logging.getLogger(__name__)

_CLOSING_SECONDS = 10.0
"""Time for QEMU to close an image after the pivot."""
_POLL_SECONDS = 0.1


class Settlement:
    """Finishes and undoes copies. The caller of a method with a copy holds the lock of the copy."""

    def __init__(self, host: Host, disks: Disks, start: DomainStart) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._locks = host.locks
        self._disks = disks
        self._start = start

    def recover(self) -> None:
        """Finish or undo the copies of killed processes. Copies that the agent continues are left alone.

        A copy that cannot be settled now, e.g. because libvirt does not answer, is logged and left to the
        next command.
        """
        for copy in self._store.replacements.all():
            if copy.state is ReplacementState.KEPT:
                continue
            try:
                with self._locks.hold(copy.lock_id):
                    if found := self._store.replacements.find(copy.disk_id):
                        self.settle(found, leave_detached=True)
            except DiskInUseError:
                continue
            except VirtSseError as exc:
                _log.warning("the copy of disk %s is not finished: %s", copy.name, exc)
            except Exception:  # noqa: BLE001 -- one disk must not stop every command of the host
                _log.exception("the copy of disk %s is not finished", copy.name)

    @contextlib.contextmanager
    def undone_after_failure(self, copy: Replacement) -> Iterator[None]:
        """Undo the copy if the block fails, unless another process goes on or the new disk has taken over."""
        try:
            yield
        except CopyInterruptedError:
            raise
        except BaseException:
            try:
                self.settle(copy)
            except VirtSseError as exc:
                _log.warning("the copy of disk %s is not undone yet: %s", copy.name, exc)
            if not self._has_taken_over(copy):
                raise

    def settle(self, copy: Replacement, *, leave_detached: bool = False) -> None:
        """Finish a copy if the new disk has taken over or the domain uses the new disk; else undo the copy.

        :param leave_detached: leave copies alone that the agent continues.
        :raise VirtSseError: By meaning, when neither is possible now.
        """
        found = self._store.replacements.find(copy.disk_id)
        if found is None:
            return
        if found.state is ReplacementState.DONE:
            self.finish(found)
            return
        is_left = leave_detached and found.is_detached and not found.is_cancelled
        with self._locks.hold(found.disk_id):
            if not self._store.with_ids([found.disk_id]):
                if not is_left:
                    self._store.replacements.abandon(found)
                return
            self._disks.remove_remains(found.disk_id)
        if self._uses_new_disk(found):
            if found.state is ReplacementState.PIVOTING:
                self._store.replacements.take_over(found)
                self._online(found).resume_guest()
            else:
                self._store.replacements.take_over(found)
            self.finish(found)
        elif not is_left:
            self._undo(found)

    def finish_or_leave(self, copy: Replacement) -> None:
        """As :meth:`finish`; after a failure, the rest is left to the next command."""
        try:
            self.finish(copy)
        except VirtSseError as exc:
            _log.warning("disk %s has its new keys; the next command removes the rest: %s", copy.name, exc)

    def finish(self, copy: Replacement) -> None:
        """Do what remains once the new disk has taken over; each part can be repeated.

        :raise VirtSseError: By meaning, when that is impossible now.
        """
        if copy.domain_id is not None:
            self._online(copy).take_back_source()
        if copy.source_id is not None:
            self._await_closed(copy.source_id)
            self._disks.remove_remains(copy.source_id)
        if copy.final_path is not None:
            self._move(copy, copy.final_path)
        self._rewrite_definitions(copy)
        if copy.source_path is not None and os.path.lexists(copy.source_path):
            self._store.replacements.set_state(copy, ReplacementState.KEPT)
        else:
            self._store.replacements.remove(copy)

    def _has_taken_over(self, copy: Replacement) -> bool:
        found = self._store.replacements.find(copy.disk_id)
        new = self._store.with_ids([copy.disk_id])
        is_settled = found is None or found.state is ReplacementState.DONE
        return is_settled and any(disk.state is DiskState.READY for disk in new)

    def _uses_new_disk(self, copy: Replacement) -> bool:
        if copy.domain_id is None:
            return False
        with contextlib.suppress(VmStateError, DiskNotFoundError):
            if (pivoted := self._online(copy).has_pivoted()) is not None:
                return pivoted
            with connected(self._uri) as connection:
                domain = domains.find(connection, copy.domain_id)
                return domain is not None and has_new_disk(domains.definition(domain, inactive=True), copy)
        return False

    def _undo(self, copy: Replacement) -> None:
        if copy.domain_id is not None:
            self._online(copy).abort()
            if copy.state is ReplacementState.PIVOTING:
                with contextlib.suppress(VmStateError):
                    self._online(copy).resume_guest()
        self._store.replacements.abandon(copy)
        if self._store.with_ids([copy.disk_id]):
            with self._locks.hold(copy.disk_id):
                self._await_closed(copy.disk_id)
                self._disks.remove_remains(copy.disk_id)

    def _move(self, copy: Replacement, final_path: Path) -> None:
        """Give the image of the new disk its final path.

        :raise ImageError: When that is impossible; the disk stays usable at its present path.
        """
        disk = self._store.get(str(copy.disk_id))
        if disk.path == final_path:
            return
        try:
            if envelope_slots.carried_id(final_path, disk.format) != disk.id:
                publish(disk.path, final_path)
            disk.path.unlink(missing_ok=True)
        except FileExistsError:
            _log.warning("disk %s stays at %s: %s exists", disk.name, disk.path, final_path)
            return
        except OSError as exc:
            raise ImageError(f"cannot rename {disk.path}: {exc.strerror}") from exc
        with contextlib.suppress(DiskExistsError):
            self._store.set_path(disk.id, final_path)

    def _rewrite_definitions(self, copy: Replacement) -> None:
        """Put the new disk into the persistent definitions of all domains with the source.

        :raise LibvirtError: When libvirt refuses.
        """
        disk = self._store.get(str(copy.disk_id))
        source = self._start.source(disk)
        if copy.source_id is None:
            self._rewrite_definition(copy, source)
            return
        sources = {copy.source_id: source, disk.id: source}
        with connected(self._uri) as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT):
                with domains.gone_is_fine():
                    definition = domains.definition(domain, inactive=True, secure=True)
                    if any(use.disk_id in sources for use in definition.our_disks):
                        edit = DomainEdit(definition)
                        edit.set_sources(sources)
                        if (changed := edit.result()) is not definition:
                            connection.defineXML(changed.to_xml())

    def _rewrite_definition(self, copy: Replacement, source: DiskSource) -> None:
        """Put the new disk in the place of the plaintext image in the persistent definition of the domain."""
        assert copy.domain_id is not None  # noqa: S101 -- of a plaintext image
        with connected(self._uri) as connection:
            domain = domains.find(connection, copy.domain_id)
            if domain is None or not domain.isPersistent():
                return
            definition = domains.definition(domain, inactive=True, secure=True)
            for chain in definition.disk_chains():
                is_plain = is_image(connection, definition, copy.target, copy.source_path)
                if chain.target == copy.target and (is_plain or chain.disk_id == copy.disk_id):
                    edit = DomainEdit(definition)
                    edit.encrypt_disk(copy.target, source)
                    if (changed := edit.result()) is not definition:
                        connection.defineXML(changed.to_xml())
                    return

    def _await_closed(self, disk_id: uuid.UUID) -> None:
        """Wait until QEMU has closed the image of a disk that no domain uses any more.

        :raise DiskInUseError: When QEMU has the image still open.
        """
        for disk in self._store.with_ids([disk_id]):
            with contextlib.suppress(ImageError):  # gone already
                await_unlocked(disk.path)

    def _online(self, copy: Replacement) -> OnlineCopy:
        return OnlineCopy(self._host, self._start, copy)


def await_unlocked(path: Path) -> None:
    """Wait until QEMU has closed a file.

    :raise DiskInUseError: When QEMU has the file still open.
    """
    deadline = time.monotonic() + _CLOSING_SECONDS
    while True:
        try:
            image_file.refuse_if_open(path)
            return
        except DiskInUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)
