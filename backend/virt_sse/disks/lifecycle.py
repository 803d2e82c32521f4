"""The life of a disk: create, adopt, resize, check, delete.

The order of writes protects the data. A DEK is wrapped and committed (``creating``) before anything is
encrypted with this DEK. The image gets its name once complete; then the disk becomes ``ready``.
:meth:`Disks.recover` finishes or undoes the work of killed commands; every command calls it first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    EncryptionSetNotFoundError,
    EnvelopeError,
    ImageError,
    InvalidValueError,
    VirtSseError,
)
from virt_sse.in_guest.images import in_image
from virt_sse.keys.encryption_sets import EncryptionSets
from virt_sse.keys.host import Host
from virt_sse.libvirt.pools import pool_folder, refresh_pool
from virt_sse.model.content import Content
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import (
    PLATFORM_KEY,
    Disk,
    DiskState,
    NewDisk,
    StoragePool,
    check_name,
    check_path,
    check_size,
)
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType, LayerChoice, LayerPlan
from virt_sse.model.operations import CreateDisk, DeleteDisk, ResizeDisk
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.qemu import envelope_slots, img
from virt_sse.qemu.formatting import Volume, make
from virt_sse.system.files import publish, sync_folder

_log = logging.getLogger(__name__)

Fill = Callable[[Path, Sequence[Dek]], None]
"""Writes the first content of a new disk into its encrypted image at a path."""


class Attachments(Protocol):
    """The libvirt domains that use a disk."""

    def users(self, disk: Disk) -> list[str]:
        """The names of the domains, running or defined, that have the disk."""

    def resize_live(self, disk: Disk, size: int) -> bool:
        """Resize the disk in the running domain that has the disk; whether there was such a domain."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """A new disk whose name, size, path, set and layers have been checked."""

    new: NewDisk
    size: int
    path: Path
    encryption_set: EncryptionSet | None
    encryption_type: EncryptionType
    plan: LayerPlan


class Disks:
    """Creates, changes and deletes disks. Methods take a disk's name or id.

    :raise DiskNotFoundError: When the store has no such disk.
    """

    def __init__(self, host: Host, sets: EncryptionSets, attachments: Attachments) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._sets = sets
        self._attachments = attachments

    def all(self) -> list[Disk]:
        """All disks, by name."""
        return [self._refresh(disk) for disk in self._store.all()]

    def get(self, name: str) -> Disk:
        """The disk of that name or id."""
        return self._refresh(self._store.get(name))

    def with_ids(self, ids: Collection[uuid.UUID]) -> list[Disk]:
        """The disks with these ids, as stored; unknown ids are left out."""
        return self._store.with_ids(ids)

    def create(self, new: NewDisk, *, fill: Fill | None = None, content: Content | None = None) -> Disk:
        """Create a disk.

        :param fill: writes the first content; default: the disk is empty.
        :param content: this content, for policies.
        :raise InvalidValueError: When name, size or place is invalid.
        :raise EncryptionSetNotFoundError: When the set does not exist.
        :raise DiskExistsError: When the name or the path is taken.
        :raise PolicyError: When a rule refuses the disk.
        :raise KeyProviderError: When the DEK cannot be wrapped.
        :raise ImageError: When the image cannot be written.
        """
        checked = self._check(new, content)
        deks = [Dek.generate() for _ in checked.plan.deks]
        disk = self._with_wrapped_deks(checked, deks)
        with self._locks.hold(disk.id):
            self._store.add(disk)
            try:
                _write_image(disk, checked.plan, deks, fill)
            finally:
                self._settle_creation(disk)
        if isinstance(new.place, StoragePool):
            refresh_pool(self._config.libvirt_uri, new.place.name)
        return self._store.get(str(disk.id))

    def _check(self, new: NewDisk, content: Content | None) -> _Checked:
        """Check everything about a new disk that can be checked before anything is written."""
        encryption_set = self._sets.usable(new.encryption_set) if new.encryption_set is not None else None
        check_name(new.name)
        if new.size is None:
            raise InvalidValueError(f"no size for disk {new.name!r}")
        size = check_size(new.size)
        path = check_path(self._image_path(new))
        key = encryption_set.key if encryption_set else PLATFORM_KEY
        encryption_type = encryption_set.encryption_type if encryption_set else EncryptionType.PLATFORM_KEY
        self._plugins.validate(CreateDisk(new.name, size, path, new.format, encryption_type, key, content))
        layer = self._plugins.encryption_layer(encryption_type)
        cipher = new.infrastructure_cipher or self._config.infrastructure_cipher
        plan = layer.plan(LayerChoice(key, cipher))
        if os.path.lexists(path):
            raise DiskExistsError(f"{path} exists already")
        if not os.path.isdir(path.parent):  # noqa: PTH112 -- Path.is_dir raises for a name that is too long
            raise ImageError(f"{path.parent} is not a folder")
        return _Checked(new, size, path, encryption_set, encryption_type, plan)

    def _image_path(self, new: NewDisk) -> Path:
        if isinstance(new.place, Path):
            return new.place
        folder = self._config.disk_directory
        if isinstance(new.place, StoragePool):
            folder = pool_folder(self._config.libvirt_uri, new.place.name)
        return folder / f"{new.name}.{new.format.value}"

    def _with_wrapped_deks(self, checked: _Checked, deks: Sequence[Dek]) -> Disk:
        """The disk to be created, with its DEKs wrapped."""
        disk_id = uuid.uuid4()
        entries = []
        for position, (spec, dek) in enumerate(zip(checked.plan.deks, deks, strict=True)):
            acting = checked.encryption_set if position == 0 else None  # see Disk.identity_for
            wrapped = self._keys.wrap(
                dek,
                self._keys.wrapping_key(spec.key, acting),
                context=DekContext(disk_id, spec.slot),
                set_id=acting.id if acting else None,
            )
            entries.append(DekEntry(spec.slot, spec.cipher, wrapped))
        return Disk(
            id=disk_id,
            name=checked.new.name,
            path=checked.path,
            format=checked.new.format,
            size=checked.size,
            state=DiskState.CREATING,
            encryption_type=checked.encryption_type,
            created=datetime.now(UTC).replace(microsecond=0),
            generation=1,
            deks=tuple(entries),
            sku=checked.new.sku,
            set_id=checked.encryption_set.id if checked.encryption_set else None,
        )

    def _settle_creation(self, disk: Disk) -> None:
        """End a creation: the disk is ready if its image has its name; otherwise the creation is undone.

        :raise ImageError: When the partial image cannot be removed.
        """
        _remove(_partial(disk))
        if carried_id(disk.path, disk.format) == disk.id:
            self._store.set_state(disk.id, DiskState.READY)
        else:
            self._store.remove(disk.id)

    def recover(self) -> None:
        """Finish or undo the work of killed commands. Disks locked by other commands are left alone.

        A disk that cannot be recovered now, e.g. because its storage is away, is logged and left to the next
        command, so that all other disks stay usable.
        """
        for disk in self._store.unfinished():
            try:
                self._recover_disk(disk)
            except (DiskInUseError, DiskNotFoundError):
                continue
            except VirtSseError as exc:
                _log.warning("disk %s stays %s: %s", disk.name, disk.state.value, exc)

    def _recover_disk(self, disk: Disk) -> None:
        with self._locks.hold(disk.id):
            current = self._store.get(str(disk.id))
            if current.state is DiskState.CREATING:
                self._settle_creation(current)
            elif current.state is DiskState.DELETING:
                self._finish_deletion(current)

    def adopt(self, path: Path, *, name: str | None = None, encryption_set: str | None = None) -> Disk:
        """Add the disk with the image at *path* to the store, from the envelope in the image.

        If the store knows the disk by another path and no image is left there, the store takes the new path.

        :param name: default: the name in the envelope.
        :param encryption_set: name or id; default: the set in the envelope.
        :raise ImageFormatError: When the image is not encrypted, or the DEK does not open the image.
        :raise EnvelopeError: When the envelope cannot be read.
        :raise EncryptionSetNotFoundError: When the store lacks the set in the envelope and no set is given.
        :raise DiskExistsError: When the store has the disk, the name or the path.
        :raise KeyProviderError: When the DEK cannot be unwrapped, e.g. because it is under another host's
            key.
        """
        given = self._sets.usable(encryption_set) if encryption_set is not None else None
        path = check_path(path)
        with img.opened(path) as descriptor:
            image_format = img.probe_format(descriptor)
            carried = envelope_slots.read(descriptor, image_format)
        if any(entry.slot == TEMP_SLOT for entry in carried.deks):
            raise ImageError(f"{path} is the temporary disk of a VM; it is erased when the VM ends")
        disk = Disk(
            id=carried.disk_id,
            name=check_name(name or carried.name),
            path=path,
            format=image_format,
            size=0,  # unknown until unlocked
            state=DiskState.READY,
            encryption_type=carried.encryption_type,
            created=carried.created,
            generation=carried.generation,
            deks=carried.deks,
            set_id=self._set_of(carried, given),
        )
        if not disk.deks:
            raise EnvelopeError(f"the envelope of {path} holds no DEK")
        with self._locks.hold(disk.id):
            deks = self._keys.unwrap_all(disk)
            img.check_unlocks(path, image_format, deks)
            disk = dataclasses.replace(disk, size=img.usable_size_within(path, image_format, deks))
            content = Content(lambda: in_image(path, image_format, deks))
            self._plugins.validate(
                CreateDisk(disk.name, disk.size, path, image_format, disk.encryption_type, disk.key, content)
            )
            if disk.envelope != carried:
                with img.opened(path, os.O_RDWR) as descriptor:
                    envelope_slots.write(descriptor, image_format, disk.envelope)
            try:
                known = self._store.get(str(disk.id))
            except DiskNotFoundError:
                self._store.add(disk)
            else:
                if known.path == path or os.path.lexists(known.path):
                    raise DiskExistsError(f"the store has this disk as {known.name!r}, at {known.path}")
                self._store.set_path(disk.id, path)
            return self._store.get(str(disk.id))

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

    def image_state(self, disk: Disk) -> str:
        """The state of the disk's image by its envelope, without a key: ``present``, or an error message."""
        try:
            with img.opened(disk.path) as descriptor:
                if envelope_slots.read(descriptor, disk.format).disk_id != disk.id:
                    return f"{disk.path} is the image of another disk"
        except ImageError as exc:
            return str(exc)
        return "present"

    def _refresh(self, disk: Disk) -> Disk:
        """The disk with the real size of its image, after an interrupted resize or a resize by other tools.

        Missing or damaged images change nothing, nor do images with several layers: their size is encrypted.
        """
        if disk.state is not DiskState.READY or len(disk.deks) > 1:
            return disk
        with contextlib.suppress(ImageError), img.opened(disk.path) as descriptor:
            size = img.usable_size(descriptor, disk.format)
            if size != disk.size:
                self._store.set_size(disk.id, size)
                return dataclasses.replace(disk, size=size)
        return disk

    def resize(self, name: str, size: int, *, shrink: bool = False) -> Disk:
        """Resize a disk to *size* bytes, also while a domain uses the disk.

        :param shrink: allow a smaller size; the data beyond is lost.
        :raise InvalidValueError: When the size is invalid, or smaller without *shrink*.
        :raise DiskInUseError: When a QEMU process outside libvirt has the disk open.
        """
        disk = self._store.get(name)
        check_size(size)
        with self.usable(disk) as current:
            current = self._refresh(current)
            if size < current.size and not shrink:
                raise InvalidValueError(
                    f"disk {disk.name!r} has {current.size} bytes, more than {size}",
                    hint="data beyond the new size is lost; pass --shrink to confirm",
                )
            self._plugins.validate(ResizeDisk(current, size))
            if not self._attachments.resize_live(current, size):
                deks = self._keys.unwrap_all(current)
                img.resize(current.path, current.format, size, deks, shrink=shrink)
            self._store.set_size(current.id, size)
            return self._refresh(dataclasses.replace(current, size=size))

    def check(self, name: str) -> None:
        """Check a disk's image: intact, opens with the DEK, carries the wrapped DEKs of the store.

        :raise ImageError: When the image fails the check.
        :raise DiskInUseError: When a QEMU process has the image open.
        """
        with self.usable(self._store.get(name)) as current:
            img.check(current.path, current.format, self._keys.unwrap_all(current))
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
                if carried_id(current.path, current.format) != current.id:
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
            if carried_id(disk.path, disk.format) == disk.id:
                disk.path.rename(doomed)
                sync_folder(doomed.parent)
            if os.path.lexists(doomed):
                img.erase(doomed, disk.format)
                self._store.drop_deks(disk.id)
                doomed.unlink()
                sync_folder(doomed.parent)
        except OSError as exc:
            raise ImageError(f"cannot remove {disk.path}: {exc.strerror}") from exc
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


def _write_image(disk: Disk, plan: LayerPlan, deks: Sequence[Dek], fill: Fill | None) -> None:
    """Write the image of a new disk and give the complete image its name.

    :raise DiskExistsError: When the name is taken.
    :raise ImageError: When the image cannot be written.
    """
    partial = _partial(disk)
    try:
        make(
            partial,
            disk.format,
            disk.size,
            [Volume(spec.cipher, dek) for spec, dek in zip(plan.deks, deks, strict=True)],
        )
        if fill:
            fill(partial, deks)
        with img.opened(partial, os.O_RDWR) as descriptor:
            envelope_slots.write(descriptor, disk.format, disk.envelope)
        publish(partial, disk.path)
    except FileExistsError as exc:
        raise DiskExistsError(f"{disk.path} exists already") from exc
    except OSError as exc:
        raise ImageError(f"cannot make {disk.path}: {exc.strerror}") from exc
    except ImageError as exc:
        raise ImageError(f"cannot make {disk.path}: {exc}") from exc


def _partial(disk: Disk) -> Path:
    """The path of an incomplete image."""
    return disk.path.with_name(f".{disk.id}.partial")


def _doomed(disk: Disk) -> Path:
    """The path of an image during its erasure."""
    return disk.path.with_name(f".{disk.id}.erased")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        if exc.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR):  # such a file cannot exist
            raise ImageError(f"cannot remove {path}: {exc.strerror}") from exc


def carried_id(path: Path, image_format: DiskFormat) -> uuid.UUID | None:
    """The disk id in the envelope of the image at *path*; ``None`` without a readable envelope."""
    try:
        with img.opened(path) as descriptor:
            return envelope_slots.read(descriptor, image_format).disk_id
    except ImageError:
        return None
