"""The creation of disks.

The order of writes protects the data. A DEK is wrapped and committed (``creating``) before anything is
encrypted with this DEK. The image gets its name once complete; then the disk becomes ``ready``. A block
device, which has a name, gets its first bytes, without which nothing opens it, once complete. Disks made
together, e.g. the snapshots of all disks of a domain, become ready together or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from virt_sse.disks import backup_manifest
from virt_sse.errors import DiskExistsError, ImageError, InvalidValueError
from virt_sse.keys.encryption_sets import EncryptionSets
from virt_sse.keys.host import Host
from virt_sse.libvirt.pools import pool_folder, refresh_pool
from virt_sse.model.content import Content
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import (
    PLATFORM_KEY,
    Disk,
    DiskState,
    NewDisk,
    StoragePool,
    check_name,
    check_path,
    check_size,
    taken_hint,
)
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType, LayerChoice, LayerPlan
from virt_sse.model.operations import CreateDisk
from virt_sse.qemu import device_image, image_file
from virt_sse.qemu.formatting import Volume, make, new_beginning
from virt_sse.system.block_devices import is_device
from virt_sse.system.rbd_names import is_rbd


@dataclass(frozen=True, slots=True)
class Successor:
    """What a new disk takes from the disk or image whose place the new disk is to take.

    :ivar disk_id: id of the new disk, known to the record of the copy.
    :ivar name: later name of the new disk, already in the envelope.
    :ivar serial: see :attr:`Disk.serial`.
    """

    disk_id: uuid.UUID
    name: str
    serial: str | None = None


Fill = Callable[[Path, Sequence[Dek]], None]
"""Writes the first content of a new disk into its encrypted image at a path."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """A new disk whose name, size, path, set and layers have been checked."""

    new: NewDisk
    size: int
    path: Path
    encryption_set: EncryptionSet | None
    encryption_type: EncryptionType
    plan: LayerPlan


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A disk in state ``creating``.

    :ivar carried: the disk as its image's envelope has it.
    :ivar plan: its layers.
    :ivar deks: its DEKs, the guest's first.
    """

    disk: Disk
    carried: Disk
    plan: LayerPlan
    deks: tuple[Dek, ...]

    @property
    def image(self) -> Path:
        """The incomplete image, to be filled."""
        return incomplete_image(self.disk)

    @property
    def volumes(self) -> list[Volume]:
        """The LUKS volumes of the image, innermost first."""
        return [Volume(spec.cipher, dek) for spec, dek in zip(self.plan.deks, self.deks, strict=True)]

    def make(self, path: Path) -> None:
        """Make the empty image at *path*.

        :raise OSError: When *path* exists or there is no room.
        :raise ImageError: When there is no room.
        :raise ToolError: When a volume cannot be made.
        """
        make(path, self.disk.format, self.disk.size, self.volumes)


class LiveWrites(Protocol):
    """Writes of running domains into incomplete images."""

    def end(self, disk: Disk, image: Path) -> None:
        """End all that writes to the incomplete image of *disk*, left behind by a killed command.

        :raise VirtSseError: When a process still writes to the image.
        """


class Creation:
    """Creates disks, and settles creations cut off by a kill."""

    def __init__(self, host: Host, sets: EncryptionSets, live_writes: LiveWrites) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._freshness = host.freshness
        self._sets = sets
        self._live_writes = live_writes

    def create(
        self,
        new: NewDisk,
        *,
        fill: Fill | None = None,
        content: Content | None = None,
        successor: Successor | None = None,
    ) -> Disk:
        """Create a disk.

        :param fill: writes the first content; default: the disk is empty.
        :param content: this content, for policies.
        :param successor: given for the new disk of a copy.
        :raise InvalidValueError: When name, size or place is invalid.
        :raise EncryptionSetNotFoundError: When the set does not exist.
        :raise DiskExistsError: When the name or the path is taken.
        :raise PolicyError: When a rule refuses the disk.
        :raise KeyProviderError: When the DEK cannot be wrapped.
        :raise EnvelopeError: When the wrapped DEKs have no room in an image.
        :raise ImageError: When the image cannot be written.
        """
        if fill or successor:
            _refuse_device(new.place)
        with self.unfinished([new], content=content, successor=successor) as (made,):
            if fill:
                with image_errors(made.disk):
                    fill(made.image, made.deks)
        return self._store.get(str(made.disk.id))

    @contextlib.contextmanager
    def unfinished(
        self,
        new: Sequence[NewDisk],
        *,
        content: Content | None = None,
        successor: Successor | None = None,
    ) -> Iterator[tuple[Unfinished, ...]]:
        """Make the empty images of new disks; the block fills the images.

        All disks are ready after the block. If the block fails, none is left.

        :param successor: given for the new disk of a copy; *new* is then this disk alone.
        :raise VirtSseError: As :meth:`create`.
        """
        checked = [self._check(each, content) for each in new]
        made = tuple(self._with_new_deks(each, successor) for each in checked)
        with contextlib.ExitStack() as stack:
            for each in made:
                stack.enter_context(self._locks.hold(each.disk.id))
            added: list[Disk] = []
            stack.callback(self.settle, added)
            for each in made:
                self._store.add(each.disk)
                added.append(each.disk)
            for each in made:
                self._make_image(each)
            yield made
            for each in made:
                self._publish(each)
        for place in {each.place for each in new if isinstance(each.place, StoragePool)}:
            refresh_pool(self._config.libvirt_uri, place.name)

    def _check(self, new: NewDisk, content: Content | None) -> _Checked:
        """Check everything about a new disk that can be checked before anything is written."""
        if new.source or new.kind is not DiskKind.DISK:
            _refuse_device(new.place)
        encryption_set = self._sets.usable(new.encryption_set) if new.encryption_set is not None else None
        check_name(new.name, new.kind)
        if new.base and is_rbd(new.base.path):
            raise InvalidValueError(
                f"{new.base.kind.title} {new.base.name!r} is in Ceph, and nothing can be based on it",
                hint="make a full copy",
            )
        path = check_path(self._image_path(new))
        key = encryption_set.key if encryption_set else PLATFORM_KEY
        encryption_type = encryption_set.encryption_type if encryption_set else EncryptionType.PLATFORM_KEY
        layer = self._plugins.encryption_layer(encryption_type)
        cipher = new.infrastructure_cipher or self._config.infrastructure_cipher
        plan = layer.plan(LayerChoice(key, cipher, cipher=new.cipher))
        size = _checked_size(new, path, plan)
        self._plugins.validate(
            CreateDisk(
                new.name,
                size,
                path,
                new.format,
                encryption_type,
                key,
                content,
                new.sku,
                new.source,
                new.kind,
            )
        )
        if image_file.exists(path) and not is_device(path):
            known = self._store.find_by_path(path)
            hint = taken_hint(known.name, known.state) if known else None
            raise DiskExistsError(f"{path} exists already", hint=hint)
        is_in_folder = is_rbd(path) or os.path.isdir(path.parent)  # noqa: PTH112 -- Path.is_dir raises for a name that is too long
        if not is_in_folder:
            raise ImageError(
                f"{path.parent} is not a folder",
                hint="make the folder, or choose another with --path or 'directory' in [disks]",
            )
        return _Checked(new, size, path, encryption_set, encryption_type, plan)

    def _image_path(self, new: NewDisk) -> Path:
        if isinstance(new.place, Path):
            return new.place
        folder = self._config.disk_directory
        if isinstance(new.place, StoragePool):
            folder = pool_folder(self._config.libvirt_uri, new.place.name)
        return folder / f"{new.name}.{new.format.value}"

    def _with_new_deks(self, checked: _Checked, successor: Successor | None) -> Unfinished:
        """The disk to be created, with new DEKs, wrapped."""
        deks = tuple(Dek.generate() for _ in checked.plan.deks)
        disk_id = successor.disk_id if successor else checked.new.id or uuid.uuid4()
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
        disk = Disk(
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
            kind=checked.new.kind,
            source_id=source.id if (source := checked.new.source) else None,
            point=checked.new.point,
            origin_id=source.origin_id or source.id if source else None,
            base_id=base.id if (base := checked.new.base) else None,
            serial=successor.serial if successor else None,
        )
        disk.envelope.encode()  # refuses what has no room in the image, before anything is made
        carried = replace(disk, name=successor.name) if successor else disk
        return Unfinished(disk, carried, checked.plan, deks)

    def settle(self, disks: Sequence[Disk]) -> None:
        """End a creation or adoption: the disks are ready if all images are complete; otherwise undo either.

        A complete image has the disk's envelope, sealed by this host. The new disk of a copy has its later
        name there. Undoing an adoption leaves the image.
        Of several disks, a complete image of an undone creation is left in state ``deleting``, for the next
        command to erase.

        :param disks: all disks of the creation that are not ready.
        :raise VirtSseError: When an incomplete image cannot be removed.
        """
        complete = [disk for disk in disks if self._freshness.has_sealed(self._carried(disk))]
        for disk in disks:
            if disk.source_id and disk not in complete:
                self._live_writes.end(disk, incomplete_image(disk))
            _remove(incomplete_image(disk))
            if disk.base_id:
                _remove(difference_image(disk))
        if len(complete) == len(disks):
            for disk in disks:
                self._freshness.note_new(disk)
                self._store.set_state(disk.id, DiskState.READY)
            return
        for disk in complete:  # first: a kill must not leave complete images alone, as if these were all
            self._store.set_state(disk.id, DiskState.DELETING)
        for disk in disks:
            if disk not in complete:
                if not image_file.exists(disk.path):
                    backup_manifest.remove(disk)
                self._store.remove(disk.id)

    def _carried(self, disk: Disk) -> Disk:
        """The disk as its image's envelope has it."""
        copy = self._store.replacements.find(disk.id)
        return replace(disk, name=copy.name) if copy and copy.disk_id == disk.id else disk

    def _make_image(self, made: Unfinished) -> None:
        if not is_device(made.disk.path):
            with image_errors(made.disk):
                made.make(made.image)

    def _publish(self, made: Unfinished) -> None:
        """Give a complete image its name, or a block device its first bytes."""
        with image_errors(made.disk):
            if is_device(made.disk.path):
                with new_beginning(made.volumes) as content:
                    self._freshness.seal_new(content, made.carried)
                    device_image.write_beginning(content, made.disk.path)
                return
            with image_file.opened(made.image, os.O_RDWR) as descriptor:
                self._freshness.seal_new(descriptor, made.carried)
            image_file.publish(made.image, made.disk.path)


def _checked_size(new: NewDisk, path: Path, plan: LayerPlan) -> int:
    """The size of a new disk in bytes; on a block device, the room on the device."""
    if (is_device(path) or is_rbd(path)) and new.format is not DiskFormat.RAW:
        raise InvalidValueError(f"the image {path} cannot be {new.format.value}", hint="pass --format raw")
    if is_device(path):
        ciphers = [spec.cipher for spec in plan.deks]
        room = check_size(device_image.room_on(path, ciphers))
        if new.size is not None:
            device_image.refuse_other_size(path, new.size, ciphers)
        return room
    if new.size is None:
        raise InvalidValueError(f"no size for disk {new.name!r}")
    return check_size(new.size)


def _refuse_device(place: Path | StoragePool | None) -> None:
    """Refuse a block device for a disk that begins with content."""
    if isinstance(place, Path) and is_device(place):
        raise InvalidValueError(
            f"{place} is a block device, and only empty disks can be made there",
            hint="make an empty disk with 'virt-sse disk create', and copy the content within a guest",
        )


@contextlib.contextmanager
def image_errors(disk: Disk) -> Iterator[None]:
    """Name the image of a new disk in errors.

    :raise DiskExistsError: When the name is taken.
    :raise ImageError: When the image cannot be written.
    """
    try:
        yield
    except FileExistsError as exc:
        raise DiskExistsError(f"{disk.path} exists already") from exc
    except OSError as exc:
        raise ImageError(f"cannot make {disk.path}: {exc.strerror}") from exc
    except ImageError as exc:
        raise ImageError(f"cannot make {disk.path}: {exc}", hint=exc.hint) from exc


def incomplete_image(disk: Disk) -> Path:
    """The path of the image of a disk in state ``creating``."""
    return disk.path.with_name(f".{disk.id}.partial")


def difference_image(disk: Disk) -> Path:
    """The path of the image with the changes, during the comparison of an :func:`incomplete_image`."""
    return disk.path.with_name(f".{disk.id}.difference")


def _remove(path: Path) -> None:
    try:
        image_file.remove(path)
    except OSError as exc:
        if exc.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR):  # such a file cannot exist
            raise ImageError(f"cannot remove {path}: {exc.strerror}") from exc
