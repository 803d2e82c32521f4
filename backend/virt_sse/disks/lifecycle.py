"""How disks come into being, change and end: create, adopt, resize, delete.

The order of writes is the point. A DEK is wrapped and committed (``creating``) before anything is formatted
with it; the image appears under its name when it is whole; only then the disk is ``ready``. Whatever a killed
command left is finished or undone by :meth:`Provisioning.recover`, which every command runs first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

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
from virt_sse.keys.access import Wrapping
from virt_sse.model.ciphers import Cipher
from virt_sse.model.content import Content
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskSku, DiskState, check_name, check_path, check_size
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType, LayerChoice
from virt_sse.model.operations import CreateDisk, DeleteDisk, ResizeDisk
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.plugins import PluginHost
from virt_sse.qemu import envelope_slots, img
from virt_sse.qemu.formatting import Volume, make
from virt_sse.store import Store
from virt_sse.system.files import publish, sync_folder
from virt_sse.system.locks import DiskLocks

_log = logging.getLogger(__name__)


class Provisioning:
    """Makes, changes and deletes disks."""

    def __init__(
        self,
        store: Store,
        plugins: PluginHost,
        wrapping: Wrapping,
        locks: DiskLocks,
        infrastructure_cipher: Cipher,
    ) -> None:
        self._infrastructure_cipher = infrastructure_cipher
        self._store = store
        self._plugins = plugins
        self._wrapping = wrapping
        self._locks = locks

    def create(
        self,
        name: str,
        size: int,
        path: Path,
        *,
        image_format: DiskFormat,
        sku: DiskSku,
        encryption_set: EncryptionSet | None,
        infrastructure_cipher: Cipher | None = None,
        fill: Callable[[Path, Sequence[Dek]], None] | None = None,
        content: Content | None = None,
    ) -> Disk:
        """Make a disk of *size* bytes; its image lies at *path*.

        :param encryption_set: whose key it is under; the platform's key without.
        :param infrastructure_cipher: of the layer under the platform's key, if it is to have one; default the
            configured one.
        :param fill: writes the first content into the image at the path that it is given.
        :param content: that content, for policies to look at.
        :raise InvalidValueError: When name or size make no sense.
        :raise DiskExistsError: When the name or the path is taken.
        :raise PolicyError: When a rule refuses it.
        :raise KeyProviderError: When the DEK cannot be wrapped.
        :raise ImageError: When the image cannot be written.
        """
        check_name(name)
        check_size(size)
        path = check_path(path)
        key = encryption_set.key if encryption_set else PLATFORM_KEY
        encryption_type = encryption_set.encryption_type if encryption_set else EncryptionType.PLATFORM_KEY
        self._plugins.validate(CreateDisk(name, size, path, image_format, encryption_type, key, content))
        layer = self._plugins.encryption_layer(encryption_type)
        plan = layer.plan(LayerChoice(key, infrastructure_cipher or self._infrastructure_cipher))
        if os.path.lexists(path):
            raise DiskExistsError(f"{path} exists already")
        if not os.path.isdir(path.parent):  # noqa: PTH112 -- Path.is_dir raises for a name that is too long
            raise ImageError(f"{path.parent} is not a folder")

        disk_id = uuid.uuid4()
        set_id = encryption_set.id if encryption_set else None
        deks = [Dek.generate() for _ in plan.deks]
        entries = []
        for position, (spec, dek) in enumerate(zip(plan.deks, deks, strict=True)):
            acting = encryption_set if position == 0 else None  # see Disk.identity_for
            wrapped = self._wrapping.wrap(
                dek,
                self._wrapping.wrapping_key(spec.key, acting),
                context=DekContext(disk_id, spec.slot),
                encryption_set=acting.id if acting else None,
            )
            entries.append(DekEntry(spec.slot, spec.cipher, wrapped))
        disk = Disk(
            id=disk_id,
            name=name,
            path=path,
            format=image_format,
            size=size,
            state=DiskState.CREATING,
            encryption_type=encryption_type,
            created=datetime.now(UTC).replace(microsecond=0),
            generation=1,
            deks=tuple(entries),
            sku=sku,
            encryption_set=set_id,
        )
        with self._locks.hold(disk_id):
            self._store.add(disk)
            try:
                partial = _partial(disk)
                volumes = [Volume(spec.cipher, dek) for spec, dek in zip(plan.deks, deks, strict=True)]
                make(partial, image_format, size, volumes)
                if fill:
                    fill(partial, deks)
                with img.opened(partial, os.O_RDWR) as descriptor:
                    envelope_slots.write(descriptor, image_format, disk.envelope)
                publish(partial, path)
            except FileExistsError as exc:
                raise DiskExistsError(f"{path} exists already") from exc
            except OSError as exc:
                raise ImageError(f"cannot make {path}: {exc.strerror}") from exc
            except ImageError as exc:
                raise ImageError(f"cannot make {path}: {exc}") from exc
            finally:
                self._settle_creation(disk)
        return self._store.get(str(disk_id))

    def _settle_creation(self, disk: Disk) -> None:
        """Decide a creation that ended: ready if the image stands under its name, else undone.

        :raise ImageError: When what is left of it cannot be removed.
        """
        _remove(_partial(disk))
        if carried_id(disk.path, disk.format) == disk.id:
            self._store.set_state(disk.id, DiskState.READY)
        else:
            self._store.remove(disk.id)

    def recover(self) -> None:
        """Finish or undo what killed commands left half-done; what is under way elsewhere is left alone.

        What cannot be finished now, its storage being away for one, is logged and left for the next command:
        it must not keep all other disks from being used.
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

    def adopt(self, path: Path, *, name: str | None, encryption_set: EncryptionSet | None) -> Disk:
        """Put the disk whose image lies at *path* into the store, from what the image carries.

        A disk that the store knows by another path, where it lies no more, is known by the new one.

        :param name: default the name that the image carries.
        :param encryption_set: default the one that the image carries.
        :raise ImageFormatError: When it is no encrypted image, or its DEK does not open it.
        :raise EnvelopeError: When its envelope cannot be read.
        :raise EncryptionSetNotFoundError: When it was in a set that the store has not, and none is given.
        :raise DiskExistsError: When the store has the disk, the name or the path.
        :raise KeyProviderError: When its DEK cannot be unwrapped, e.g. being under another host's key.
        """
        path = check_path(path)
        with img.opened(path) as descriptor:
            image_format = img.probe_format(descriptor)
            carried = envelope_slots.read(descriptor, image_format)
        if any(entry.slot == TEMP_SLOT for entry in carried.deks):
            raise ImageError(f"{path} is the temporary disk of a VM, and goes with it")
        disk = Disk(
            id=carried.disk_id,
            name=check_name(name or carried.name),
            path=path,
            format=image_format,
            size=0,  # unknown until it is unlocked
            state=DiskState.READY,
            encryption_type=carried.encryption_type,
            created=carried.created,
            generation=carried.generation,
            deks=carried.deks,
            encryption_set=self._set_of(carried, encryption_set),
        )
        if not disk.deks:
            raise EnvelopeError(f"the envelope of {path} holds no DEK")
        with self._locks.hold(disk.id):
            deks = self.unlock(disk)
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
                    raise DiskExistsError(f"disk {known.name!r} is that disk, at {known.path}")
                self._store.set_path(disk.id, path)
            return self._store.get(str(disk.id))

    def _set_of(self, carried: Envelope, given: EncryptionSet | None) -> uuid.UUID | None:
        """The encryption set that an adopted disk is in from now on."""
        if given or not carried.encryption_set:
            return given.id if given else None
        try:
            return self._store.encryption_sets.get(str(carried.encryption_set)).id
        except EncryptionSetNotFoundError as exc:
            raise EncryptionSetNotFoundError(
                f"the disk was in encryption set {carried.encryption_set}, which the store does not have",
                hint="say --des with a set that may use the disk's key",
            ) from exc

    def unlock(self, disk: Disk) -> list[Dek]:
        """The DEKs that open the disk's image, the guest's first.

        :raise KeyProviderError: When the provider refuses.
        """
        return self._wrapping.unwrap_all(disk)

    def refresh(self, disk: Disk) -> Disk:
        """The disk with its image's real size: a resize may have been cut off, or done by others.

        A missing or damaged image changes nothing, nor does one with several layers: its size is encrypted.
        """
        if disk.state is not DiskState.READY or len(disk.deks) > 1:
            return disk
        with contextlib.suppress(ImageError), img.opened(disk.path) as descriptor:
            size = img.usable_size(descriptor, disk.format)
            if size != disk.size:
                self._store.set_size(disk.id, size)
                return dataclasses.replace(disk, size=size)
        return disk

    def resize(self, disk: Disk, size: int, *, shrink: bool, live: Callable[[int], bool]) -> Disk:
        """Make the disk *size* bytes large.

        :param shrink: allow a smaller size; what lies beyond is lost.
        :param live: resizes it in the domain that has it open, and says whether there was one.
        :raise InvalidValueError: When the size makes no sense, or is smaller and *shrink* is not said.
        :raise DiskInUseError: When the disk is open in another QEMU process.
        """
        check_size(size)
        with self.usable(disk) as current:
            current = self.refresh(current)
            if size < current.size and not shrink:
                raise InvalidValueError(
                    f"disk {disk.name!r} has {current.size} bytes, more than {size}",
                    hint="a smaller disk loses what lies beyond; if that is meant, say --shrink",
                )
            self._plugins.validate(ResizeDisk(current, size))
            if not live(size):
                img.resize(current.path, current.format, size, self.unlock(current), shrink=shrink)
            self._store.set_size(current.id, size)
            return self.refresh(dataclasses.replace(current, size=size))

    def check(self, disk: Disk) -> None:
        """See whether the disk's image is whole and opens with its DEK.

        :raise ImageError: When it is not, or does not.
        :raise DiskInUseError: When a QEMU process has it open.
        """
        with self.usable(disk) as current:
            img.check(current.path, current.format, self.unlock(current))
            with img.opened(current.path) as descriptor:
                carried = envelope_slots.read(descriptor, current.format)
            if carried != current.envelope:
                raise EnvelopeError(f"the envelope in {current.path} is not what the store has")

    def delete(self, disk: Disk, *, dry_run: bool) -> None:
        """Crypto-erase: wipe the image's keyslots, forget the wrapped DEKs, remove the file.

        A disk whose image is missing is forgotten.

        :param dry_run: just see whether it could be done.
        :raise DiskInUseError: When a QEMU process has it open.
        :raise ImageError: When what lies at its path is not its image.
        """
        with self.usable(disk) as current:
            self._plugins.validate(DeleteDisk(current))
            if os.path.lexists(current.path):
                if carried_id(current.path, current.format) != current.id:
                    raise ImageError(
                        f"{current.path} is not the image of disk {disk.name!r} any more, or is damaged",
                        hint="move it away; a disk without an image is just forgotten",
                    )
                img.refuse_if_open(current.path)
            if dry_run:
                return
            self._store.set_state(current.id, DiskState.DELETING)
            self._finish_deletion(current)

    def _finish_deletion(self, disk: Disk) -> None:
        """Erase and remove the image, under a name of its own: after a kill, another may lie at its path.

        :raise ImageError: When it cannot be erased or removed.
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
        """The disk as it is once its lock is held.

        :raise DiskInUseError: When another command is at work on it.
        :raise DiskStateError: When it is not ready.
        """
        with self._locks.hold(disk.id):
            current = self._store.get(str(disk.id))
            if current.state is not DiskState.READY:
                raise DiskStateError(f"disk {disk.name!r} is {current.state.value}")
            yield current


def _partial(disk: Disk) -> Path:
    """Where the image of a disk lies until it is whole."""
    return disk.path.with_name(f".{disk.id}.partial")


def _doomed(disk: Disk) -> Path:
    """Where it lies while it is erased."""
    return disk.path.with_name(f".{disk.id}.erased")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        if exc.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR):  # then it cannot be there
            raise ImageError(f"cannot remove {path}: {exc.strerror}") from exc


def carried_id(path: Path, image_format: DiskFormat) -> uuid.UUID | None:
    """The id of the disk whose envelope the image at *path* carries; ``None`` when it carries none."""
    try:
        with img.opened(path) as descriptor:
            return envelope_slots.read(descriptor, image_format).disk_id
    except ImageError:
        return None
