"""The life of a disk: create, adopt, resize, check, delete.

:meth:`Disks.recover` finishes or undoes the work of killed commands; every command calls it first. The order
of writes on creation is in :mod:`virt_sse.disks.creation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from virt_sse.disks import backup_manifest
from virt_sse.disks.creation import Creation, Fill, LiveWrites, Unfinished
from virt_sse.disks.stored_images import with_real_size
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    EncryptionSetNotFoundError,
    EnvelopeError,
    ImageError,
    InvalidValueError,
    KeyProviderError,
    PolicyError,
    StaleImageError,
    StoreError,
    VirtSseError,
)
from virt_sse.in_guest.images import in_image
from virt_sse.keys.encryption_sets import EncryptionSets
from virt_sse.keys.freshness import with_newer_envelope
from virt_sse.keys.host import Host
from virt_sse.model.content import Content
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import (
    PLATFORM_KEY,
    Disk,
    DiskState,
    NewDisk,
    check_kind,
    check_name,
    check_path,
    check_size,
)
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import Envelope
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType, LayerChoice
from virt_sse.model.operations import CreateDisk, DeleteDisk, ResizeDisk
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.qemu import envelope_slots, img
from virt_sse.system.files import sync_folder
from virt_sse.system.marks import Marks

_log = logging.getLogger(__name__)


class Attachments(Protocol):
    """The libvirt domains that use a disk."""

    def users(self, disk: Disk) -> list[str]:
        """The names of the domains, running or defined, that have the disk."""

    def resize_live(self, disk: Disk, size: int) -> bool:
        """Resize the disk in the running domain that has the disk; whether there was such a domain."""


class Disks:
    """Creates, changes and deletes disks. Methods take a disk's name or id.

    :raise DiskNotFoundError: When the store has no such disk.
    """

    def __init__(
        self, host: Host, sets: EncryptionSets, attachments: Attachments, live_writes: LiveWrites
    ) -> None:
        self._host = host
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._freshness = host.freshness
        self._sets = sets
        self._attachments = attachments
        self._creation = Creation(host, sets, live_writes)
        self._resizing = Marks(host.config.pending_resizes)

    def all(self, kind: DiskKind = DiskKind.DISK) -> list[Disk]:
        """All disks, by name, as stored: no image is opened, so a hung storage cannot hang a listing.

        :param kind: list the copies of this kind instead.
        """
        return [disk for disk in self._store.all() if disk.kind is kind]

    def get(self, name: str) -> Disk:
        """The disk of that name or id, with the real size of its image."""
        return with_real_size(self._host, self._store.get(name))

    def with_ids(self, ids: Collection[uuid.UUID]) -> list[Disk]:
        """The disks with these ids, as stored; unknown ids are left out."""
        return self._store.with_ids(ids)

    def create(self, new: NewDisk, *, fill: Fill | None = None, content: Content | None = None) -> Disk:
        """Create a disk; see :meth:`Creation.create`.

        :raise VirtSseError: By meaning.
        """
        return self._creation.create(new, fill=fill, content=content)

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
            current = self._store.get(str(disk.id))
            if current.state is DiskState.CREATING:
                creating = [self._store.get(str(each.id)) for each in group]
                self._creation.settle([each for each in creating if each.state is DiskState.CREATING])
            elif current.state is DiskState.DELETING:
                self._finish_deletion(current)

    def adopt(
        self, path: Path, *, name: str | None = None, encryption_set: str | None = None, trust: bool = False
    ) -> Disk:
        """Add the disk with the image at *path* to the store, from the envelope in the image.

        If the store knows the disk by another path and no image is left there, the store takes the new path.

        :param name: default: the name in the envelope.
        :param encryption_set: name or id; default: the set in the envelope.
        :param trust: take over an image without a valid seal of this host, or an older image; audited.
        :raise StaleImageError: When the image is such an image, without *trust*.
        :raise ImageFormatError: When the image is not encrypted, or the DEK does not open the image.
        :raise EnvelopeError: When the envelope cannot be read, or has other layers than its type.
        :raise EncryptionSetNotFoundError: When the store lacks the set in the envelope and no set is given.
        :raise DiskExistsError: When the store has the disk, the name or the path.
        :raise KeyProviderError: When the DEK cannot be unwrapped, e.g. because it is under another host's
            key.
        """
        given = self._sets.usable(encryption_set) if encryption_set is not None else None
        path = check_path(path)
        found = self._freshness.carried_by(path)
        image_format, carried = found.format, found.envelope
        if any(entry.slot == TEMP_SLOT for entry in carried.deks):
            raise ImageError(f"{path} is the temporary disk of a VM; it is erased when the VM ends")
        disk = Disk(
            id=carried.disk_id,
            name=check_name(name or carried.name, carried.kind),
            path=path,
            format=image_format,
            size=0,  # unknown until unlocked
            state=DiskState.READY,
            encryption_type=carried.encryption_type,
            created=carried.created,
            generation=carried.generation,
            deks=carried.deks,
            set_id=self._set_of(carried, given),
            kind=carried.kind,
            source_id=carried.source_id,
        )
        if not disk.deks:
            raise EnvelopeError(f"the envelope of {path} holds no DEK")
        if not trust:
            self._freshness.refuse_untrusted(path, found)
        self._check_layers(disk)
        with self._locks.hold(disk.id):
            deks = self._keys.unwrap_all(disk)
            img.check_unlocks(path, image_format, deks)
            disk = dataclasses.replace(disk, size=img.usable_size_within(path, image_format, deks))
            content = Content(lambda: in_image(path, image_format, deks))
            self._plugins.validate(
                CreateDisk(disk.name, disk.size, path, image_format, disk.encryption_type, disk.key, content)
            )
            try:
                known = self._store.get(str(disk.id))
            except DiskNotFoundError:
                known = None
            if known and (known.path == path or os.path.lexists(known.path)):
                raise DiskExistsError(f"the store has this disk as {known.name!r}, at {known.path}")
            if trust:
                self._keys.note_trust(disk, f"adopted from {path}, {found.authenticity}")
            if trust or disk.envelope != carried:
                self._freshness.trust(disk, img.validate(path, image_format, deks))
            else:
                self._freshness.note_new(disk)
            if known:
                self._store.set_path(disk.id, path)
            else:
                self._store.add(disk)
            return self._store.get(str(disk.id))

    def trust(self, name: str) -> Disk:
        """Take a disk's image as it is for the newest, e.g. after a restore from a backup; audited.

        The image must open with the DEKs in the store, and gets the store's envelope.

        :raise ImageError: When the image does not open, or is the image of another disk.
        :raise KeyProviderError: When a DEK cannot be unwrapped.
        """
        with self.usable(self._store.get(name)) as current:
            current = self._with_newer_envelope(current)
            deks = self._keys.unwrap_all(current)
            img.check_unlocks(current.path, current.format, deks)
            try:
                self._freshness.check(current)
                reason = "the last known image"
            except StaleImageError as exc:
                reason = str(exc)
            self._keys.note_trust(current, reason)
            self._freshness.trust(current, img.validate(current.path, current.format, deks))
            return current

    def _with_newer_envelope(self, disk: Disk) -> Disk:
        """Take over the image's envelope if authentic and newer than the store's."""
        with contextlib.suppress(ImageError):  # left to the caller's checks
            found = self._freshness.check(disk)
            if found and found.uses is not None:
                return with_newer_envelope(self._host.opened_store, disk, found.envelope)
        return disk

    def _check_layers(self, disk: Disk) -> None:
        """Compare the DEKs of an adopted disk with the plan of its encryption type.

        Whoever can write to the image chooses the type, the slots and the ciphers in the envelope.

        :raise EnvelopeError: When slots, ciphers or keys differ from the plan.
        """
        differs = EnvelopeError(
            f"the layers in the envelope of {disk.path} are not those of {disk.encryption_type.value}",
            hint="the envelope was changed: restore the image from a backup",
        )
        layer = self._plugins.encryption_layer(disk.encryption_type)
        try:
            plan = layer.plan(LayerChoice(disk.key, disk.deks[-1].cipher))
        except PolicyError as exc:
            raise differs from exc
        planned = [(spec.slot, spec.cipher, spec.key) for spec in plan.deks]
        found = [(e.slot, e.cipher, KeyRef(e.wrapped.key.provider, e.wrapped.key.name)) for e in disk.deks]
        is_platform = disk.encryption_type is EncryptionType.PLATFORM_KEY
        if found != planned or (is_platform and disk.key != PLATFORM_KEY):
            raise differs

    def _set_of(self, carried: Envelope, given: EncryptionSet | None) -> uuid.UUID | None:
        """The id of the encryption set of an adopted disk."""
        if given or not carried.set_id:
            return given.id if given else None
        try:
            return self._store.encryption_sets.get(str(carried.set_id)).id
        except EncryptionSetNotFoundError as exc:
            raise EncryptionSetNotFoundError(
                f"the disk was in encryption set {carried.set_id}, which the store does not have",
                hint="pass --des with a set that may use the disk's key",
            ) from exc

    def resize(self, name: str, size: int, *, shrink: bool = False) -> Disk:
        """Resize a disk to *size* bytes, also while a domain uses the disk.

        :param shrink: allow a smaller size; the data beyond is lost.
        :raise InvalidValueError: When the size is invalid, or smaller without *shrink*.
        :raise DiskInUseError: When a QEMU process outside libvirt has the disk open.
        """
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        check_size(size)
        with self.usable(disk) as current:
            current = with_real_size(self._host, current)
            if size < current.size and not shrink:
                raise InvalidValueError(
                    f"disk {disk.name!r} has {current.size} bytes, more than {size}",
                    hint="data beyond the new size is lost; pass --shrink to confirm",
                )
            self._plugins.validate(ResizeDisk(current, size))
            with self._size_marked(current):
                if not self._attachments.resize_live(current, size):
                    deks = self._keys.unwrap_all(current)
                    img.resize(current.path, current.format, size, deks, shrink=shrink)
                self._store.set_size(current.id, size)
            return with_real_size(self._host, dataclasses.replace(current, size=size))

    @contextlib.contextmanager
    def _size_marked(self, disk: Disk) -> Iterator[None]:
        """Mark a disk with several layers, whose size only the DEKs tell, while the size may change.

        The mark outlives the block if the process is killed or the block fails after the keys were used.

        :raise StoreError: When the mark cannot be made.
        """
        if len(disk.deks) > 1:
            try:
                self._resizing.add(disk.id)
            except OSError as exc:
                raise StoreError(
                    f"cannot mark disk {disk.name!r} in {self._resizing.folder}: {exc.strerror}"
                ) from exc
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
                    if disk.state is DiskState.READY:
                        deks = self._keys.unwrap_all(disk)
                        self._store.set_size(disk_id, img.usable_size_within(disk.path, disk.format, deks))
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

        :raise StaleImageError: When the image is not the last known or a newer one.
        :raise ImageError: When the image fails the check.
        :raise DiskInUseError: When a QEMU process has the image open.
        """
        with self.usable(self._store.get(name)) as current:
            current = self._with_newer_envelope(current)
            deks = self._keys.unwrap_all(current)
            img.check(current.path, current.format, deks)
            self._freshness.check(current)
            inner = img.validate(current.path, current.format, deks)
            self._freshness.check_inner(current, inner, always_refuse=True)
            with img.opened(current.path) as descriptor:
                carried = envelope_slots.read(descriptor, current.format)
            if carried != current.envelope:
                raise EnvelopeError(f"the envelope in {current.path} differs from the store")

    def delete(self, name: str, *, dry_run: bool = False) -> Disk:
        """Delete a disk for good; see :meth:`erase`.

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
        self.erase(disk, dry_run=dry_run)
        return disk

    def erase(self, disk: Disk, *, dry_run: bool = False) -> None:
        """Crypto-erase a disk without asking libvirt: wipe keyslots, forget wrapped DEKs, remove the image.

        A disk without an image is removed from the store.

        :param dry_run: check only.
        :raise DiskInUseError: When a QEMU process has the image open.
        :raise ImageError: When the file at the disk's path is not its image.
        """
        with self.usable(disk) as current:
            self._plugins.validate(DeleteDisk(current))
            if os.path.lexists(current.path):
                if envelope_slots.carried_id(current.path, current.format) != current.id:
                    raise ImageError(
                        f"{current.path} is not the image of disk {disk.name!r} any more, or is damaged",
                        hint="move the file away; a disk without an image is removed from the store",
                    )
                img.refuse_if_open(current.path)
            if dry_run:
                return
            self._store.set_state(current.id, DiskState.DELETING)
            self._finish_deletion(current)

    def _finish_deletion(self, disk: Disk) -> None:
        """Erase and remove the image under a name of its own: after a kill, its path may hold another file.

        :raise ImageError: When the image cannot be erased or removed.
        """
        doomed = _doomed(disk)
        try:
            with contextlib.ExitStack() as stack:
                image = _open_own(stack, disk, disk.path)
                if image is not None:
                    disk.path.rename(doomed)
                    sync_folder(doomed.parent)
                else:
                    image = _open_own(stack, disk, doomed)
                    if image is None:
                        image = _open_leftover(stack, doomed)
                if image is not None:  # by descriptor: the name may meanwhile be a link made by another user
                    img.erase(Path(f"/proc/self/fd/{image}"), disk.format)
            backup_manifest.remove(disk)
            if os.path.lexists(doomed):
                self._store.drop_deks(disk.id)
                doomed.unlink()
                sync_folder(doomed.parent)
        except OSError as exc:
            raise ImageError(f"cannot remove {disk.path}: {exc.strerror}") from exc
        self._freshness.forget(disk)
        self._store.remove(disk.id)

    @contextlib.contextmanager
    def usable(self, disk: Disk) -> Iterator[Disk]:
        """Lock a disk: the disk as stored once the lock is held.

        :raise DiskInUseError: When another command holds the lock.
        :raise DiskStateError: When the disk is not ready.
        """
        with self._locks.hold(disk.id):
            current = self._store.get(str(disk.id))
            if current.state is not DiskState.READY:
                raise DiskStateError(f"disk {disk.name!r} is {current.state.value}")
            yield current


def _doomed(disk: Disk) -> Path:
    """The path of an image during its erasure."""
    return disk.path.with_name(f".{disk.id}.erased")


def _open_own(stack: contextlib.ExitStack, disk: Disk, path: Path) -> int | None:
    """Open the file at *path*; ``None`` unless the file carries the disk's envelope."""
    try:
        descriptor = stack.enter_context(img.opened(path))
    except ImageError:
        return None
    return descriptor if envelope_slots.id_in(descriptor, disk.format) == disk.id else None


def _open_leftover(stack: contextlib.ExitStack, doomed: Path) -> int | None:
    """Open an image whose erasure was interrupted and may have removed the envelope.

    ``None`` for a missing file, and for a symbolic link: any user who may write the folder can point a link
    to any file of the host.

    :raise ImageError: When the file cannot be opened, or has hard links, for the same reason.
    """
    if doomed.is_symlink() or not os.path.lexists(doomed):
        return None
    descriptor = stack.enter_context(img.opened(doomed, os.O_RDONLY | os.O_NOFOLLOW))
    if os.fstat(descriptor).st_nlink != 1:
        raise ImageError(
            f"{doomed} has further names and may be another file",
            hint="remove the file, or its other names, to finish the deletion",
        )
    return descriptor
