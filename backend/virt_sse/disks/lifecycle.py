"""The life of a disk: create, resize, check, delete for good.

Adoption is in :mod:`virt_sse.disks.adoption`, deletion for a time in :mod:`virt_sse.disks.soft_deletion`.

:meth:`Disks.recover` finishes or undoes the work of killed commands; every command calls it first. The order
of writes on creation is in :mod:`virt_sse.disks.creation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from virt_sse.disks.adoption import Adoption
from virt_sse.disks.creation import Creation, Fill, LiveWrites, Successor, Unfinished
from virt_sse.disks.erasure import Erasure
from virt_sse.disks.stored_images import usable, with_real_size
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    EnvelopeError,
    InvalidValueError,
    KeyProviderError,
    StoreError,
    VirtSseError,
)
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.encryption_sets import EncryptionSets
from virt_sse.keys.host import Host
from virt_sse.model.content import Content
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import (
    Disk,
    DiskState,
    NewDisk,
    check_kind,
    check_size,
)
from virt_sse.model.operations import ResizeDisk
from virt_sse.qemu import device_image, envelope_slots, image_file, img, unlocking
from virt_sse.system.block_devices import is_device
from virt_sse.system.marks import Marks

_log = logging.getLogger(__name__)


class Attachments(Protocol):
    """The libvirt domains that use a disk."""

    def users(self, disk: Disk) -> list[str]:
        """The names of the domains, running or defined, that have the disk."""

    def live_size(self, disk: Disk) -> int | None:
        """The size that the running domain with the disk has, in bytes; ``None`` without such a domain."""

    def resize_live(self, disk: Disk, size: int) -> bool:
        """Resize the disk in the running domain that has the disk; whether there was such a domain."""


class Disks:
    """Creates, changes and deletes disks. Methods take a disk's name or id.

    :raise DiskNotFoundError: When the store has no such disk.
    """

    def __init__(
        self,
        host: Host,
        sets: EncryptionSets,
        attachments: Attachments,
        erasure: Erasure,
        live_writes: LiveWrites,
    ) -> None:
        self._host = host
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._freshness = host.freshness
        self._attachments = attachments
        self._erasure = erasure
        self._creation = Creation(host, sets, live_writes)
        self._adoption = Adoption(host, sets, self._creation)
        self._resizing = Marks(host.config.pending_resizes)

    def all(self, kind: DiskKind = DiskKind.DISK) -> list[Disk]:
        """All disks, by name, as stored: no image is opened, so a hung storage cannot hang a listing.

        :param kind: list the copies of this kind instead.
        """
        return self._store.all(kind)

    def get(self, name: str) -> Disk:
        """The disk of that name or id, with the real size of its image."""
        return with_real_size(self._host, self._store.get(name))

    def with_ids(self, ids: Collection[uuid.UUID]) -> list[Disk]:
        """The disks with these ids, as stored; unknown ids are left out."""
        return self._store.with_ids(ids)

    def create(
        self,
        new: NewDisk,
        *,
        fill: Fill | None = None,
        content: Content | None = None,
        successor: Successor | None = None,
    ) -> Disk:
        """Create a disk; see :meth:`Creation.create`.

        :raise VirtSseError: By meaning.
        """
        return self._creation.create(new, fill=fill, content=content, successor=successor)

    def unfinished(
        self, new: Sequence[NewDisk], *, content: Content | None = None
    ) -> contextlib.AbstractContextManager[tuple[Unfinished, ...]]:
        """Make the empty images of new disks; see :meth:`Creation.unfinished`.

        :raise VirtSseError: By meaning.
        """
        return self._creation.unfinished(new, content=content)

    def recover(self) -> None:
        """Finish or undo the work of killed commands. Disks locked by other commands are left alone.

        A disk that cannot be recovered now, e.g. because its storage is away, is logged and left to the next
        command, so that all other disks stay usable. This includes unexpected exceptions: the bytes of an
        image are untrusted.
        """
        unfinished = self._store.unfinished()
        for disk in unfinished:
            try:
                self._recover_disk(disk, [each for each in unfinished if each.point == disk.point])
            except (DiskInUseError, DiskNotFoundError):
                continue
            except VirtSseError as exc:
                _log.warning("disk %s stays %s: %s", disk.name, disk.state.value, exc)
            except Exception:  # noqa: BLE001 -- one disk must not stop every command of the host
                _log.exception("disk %s stays %s", disk.name, disk.state.value)
        self._recover_sizes()

    def _recover_disk(self, disk: Disk, of_point: Sequence[Disk]) -> None:
        """Recover one disk; an unfinished creation with all disks of its point in time."""
        group = of_point if disk.point and disk.state is DiskState.CREATING else [disk]
        with contextlib.ExitStack() as locks:
            for each in group:
                locks.enter_context(self._locks.hold(each.id))
            self.remove_remains(disk.id, [each.id for each in group])

    def remove_remains(self, disk_id: uuid.UUID, group: Sequence[uuid.UUID] = ()) -> None:
        """Finish the creation or deletion of a disk, if under way; the caller holds its lock.

        :param group: the ids of all disks made together with the disk; the caller holds all locks.
        :raise ImageError: When the image cannot be erased or removed.
        """
        with contextlib.suppress(DiskNotFoundError):
            current = self._store.get(str(disk_id))
            if current.state is DiskState.CREATING:
                found = self._store.with_ids(group or [disk_id])
                self._creation.settle([each for each in found if each.state is DiskState.CREATING])
            elif current.state is DiskState.DELETING:
                self._erasure.finish(current)

    def adopt(
        self, path: Path, *, name: str | None = None, encryption_set: str | None = None, trust: bool = False
    ) -> Disk:
        """Add the disk with the image at *path* to the store; see :meth:`Adoption.adopt`.

        :raise VirtSseError: By meaning.
        """
        return self._adoption.adopt(path, name=name, encryption_set=encryption_set, trust=trust)

    def trust(self, name: str) -> Disk:
        """Take a disk's image as it is for the newest; see :meth:`Adoption.trust`.

        :raise VirtSseError: By meaning.
        """
        return self._adoption.trust(name)

    def resize(self, name: str, size: int, *, shrink: bool = False, dry_run: bool = False) -> Disk:
        """Resize a disk to *size* bytes, also while a domain uses the disk.

        :param shrink: allow a smaller size; the data beyond is lost.
        :param dry_run: check only.
        :return: the disk; with *dry_run*, as before.
        :raise InvalidValueError: When the size is invalid, or smaller without *shrink*.
        :raise DiskInUseError: When a QEMU process outside libvirt has the disk open.
        """
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        check_size(size)
        with usable(self._host, disk) as current:
            current = self.with_size_within(current)
            if size < current.size and not shrink:
                raise InvalidValueError(
                    f"disk {disk.name!r} has {current.size} bytes, more than {size}",
                    hint="data beyond the new size is lost; pass --shrink to confirm",
                )
            self._plugins.validate(ResizeDisk(current, size))
            if dry_run:
                return current
            with self._size_marked(current):
                if is_device(current.path):
                    ciphers = [entry.cipher for entry in current.deks]
                    device_image.refuse_other_size(current.path, size, ciphers)
                    self._attachments.resize_live(current, size)
                elif not self._attachments.resize_live(current, size):
                    deks = self._keys.unwrap_all(current)
                    base = unlocked_base(self._host, current)
                    img.resize(current.path, current.format, size, deks, shrink=shrink, base=base)
                self._store.set_size(current.id, size)
            return with_real_size(self._host, dataclasses.replace(current, size=size))

    def with_size_within(self, disk: Disk) -> Disk:
        """The disk with its real size, of the innermost layer; another size is stored.

        :raise KeyProviderError: When no running domain tells the size, and a DEK cannot be unwrapped.
        """
        if len(disk.deks) < 2:
            return with_real_size(self._host, disk)
        size = self._attachments.live_size(disk)
        if size is None:
            size = img.usable_size_within(disk.path, disk.format, self._keys.unwrap_all(disk))
        if size != disk.size:
            self._store.set_size(disk.id, size)
        return dataclasses.replace(disk, size=size)

    @contextlib.contextmanager
    def _size_marked(self, disk: Disk) -> Iterator[None]:
        """Mark a disk while its size may change: the next command stores the real size.

        The mark outlives the block if the process is killed or the block fails after the keys were used.

        :raise StoreError: When the mark cannot be made.
        """
        try:
            self._resizing.add(disk.id)
        except OSError as exc:
            problem = f"cannot mark disk {disk.name!r} in {self._resizing.folder}: {exc.strerror}"
            raise StoreError(problem) from exc
        try:
            yield
        except KeyProviderError:  # before the image was changed
            self._resizing.remove(disk.id)
            raise
        self._resizing.remove(disk.id)

    def _recover_sizes(self) -> None:
        """Store the sizes of images that a killed or failed command may have resized."""
        for disk_id in self._resizing.all():
            try:
                with self._locks.hold(disk_id):
                    disk = self._store.get(str(disk_id))
                    if disk.state.is_at_rest:
                        self.with_size_within(disk)
                    self._resizing.remove(disk_id)
            except DiskInUseError:
                continue
            except DiskNotFoundError:
                self._resizing.remove(disk_id)
            except VirtSseError as exc:
                _log.warning("disk %s: the size after an interrupted resize is unknown: %s", disk_id, exc)
            except Exception:  # noqa: BLE001 -- one disk must not stop every command of the host
                _log.exception("disk %s: the size after an interrupted resize is unknown", disk_id)

    def check(self, name: str) -> None:
        """Check a disk's image: intact, opens with the DEK, last known, has the store's wrapped DEKs.

        The image below a linked clone is checked for its header, seal and size.

        :raise StaleImageError: When the image is not the last known or a newer one.
        :raise ImageError: When the image fails the check.
        :raise DiskInUseError: When a QEMU process has the image open.
        """
        with usable(self._host, self._store.get(name), DiskState.READY, DiskState.DELETED) as current:
            deks = self._keys.unwrap_all(current)
            img.check(current.path, current.format, deks)
            self._freshness.check(current)
            headers = unlocking.validate(current.path, current.format, deks[1:])
            self._freshness.check_inner(current, headers, always_refuse=True)
            unlocked_base(self._host, current)
            with image_file.opened(current.path) as descriptor:
                carried = envelope_slots.read(descriptor, current.format)
            if carried != current.envelope:
                raise EnvelopeError(f"the envelope in {current.path} differs from the store")

    def delete(self, name: str, *, dry_run: bool = False, certified: bool = False) -> Disk:
        """Delete a disk, also a deleted disk, for good; see :meth:`erase`.

        :raise DiskInUseError: When a domain, running or defined, has the disk.
        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        disk = self.unattached(name)
        self.erase(disk, dry_run=dry_run, certified=certified)
        return disk

    def unattached(self, name: str) -> Disk:
        """The disk of that name or id, which no domain has.

        :raise DiskInUseError: When a domain, running or defined, has the disk.
        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        if users := self._attachments.users(disk):
            raise DiskInUseError(
                f"disk {disk.name!r} is attached to domain {users[0]!r}",
                hint=f"first run 'virt-sse disk detach {disk.name} {users[0]}'",
            )
        return disk

    def erase(
        self, disk: Disk, *, dry_run: bool = False, certified: bool = False, after: Collection[Disk] = ()
    ) -> None:
        """Erase a disk or a copy without asking libvirt; see :meth:`Erasure.erase`.

        :raise VirtSseError: By meaning.
        """
        self._erasure.erase(disk, dry_run=dry_run, certified=certified, after=after)
