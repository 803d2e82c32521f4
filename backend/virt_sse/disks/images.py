"""Images: encrypted copies in numbered versions, from which disks are made: full copies, or linked clones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from virt_sse.disks.copies import Copies, new_copy
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.transfer import Transfer
from virt_sse.errors import DiskInUseError, DiskNotFoundError, InvalidValueError, PolicyError
from virt_sse.keys.host import Host
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, NewDisk, StoragePool, check_kind, check_name
from virt_sse.system.progress import Progress, silent


class Images:
    """Makes images of disks, snapshots and foreign images, and disks of images.

    An image is given by name, for the newest version, by name, colon and version, or by id.
    """

    def __init__(self, host: Host, disks: Disks, copies: Copies, transfer: Transfer) -> None:
        self._store = host.store
        self._freshness = host.freshness
        self._disks = disks
        self._copies = copies
        self._transfer = transfer

    def versions(self, name: str) -> list[Disk]:
        """All versions of the image *name*, the oldest first."""
        found = [image for image in self._disks.all(DiskKind.IMAGE) if _base(image) == name]
        return sorted(found, key=_version)

    def get(self, name: str) -> Disk:
        """The image of that name, name and version, or id.

        :raise DiskNotFoundError: When there is no such image.
        :raise DiskStateError: When the name is that of a disk or of another copy.
        """
        if versions := self.versions(name):
            return versions[-1]
        try:
            image = self._store.get(name)
        except DiskNotFoundError as exc:
            raise DiskNotFoundError(
                f"no image {name[:80]!r}", hint="'virt-sse image list' shows all images"
            ) from exc
        check_kind(image, DiskKind.IMAGE)
        return image

    def create(
        self,
        name: str,
        source: str,
        *,
        version: int | None = None,
        encryption_set: str | None = None,
        image_format: DiskFormat | None = None,
        place: Path | StoragePool | None = None,
        quiesce: bool | None = None,
        progress: Progress = silent,
    ) -> Disk:
        """Make an image of a disk, running or not, or of a snapshot.

        :param version: default: one more than the newest.
        :param encryption_set: default: the source's.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        disk = self._store.get(source)
        check_kind(disk, DiskKind.DISK, DiskKind.SNAPSHOT)
        new = new_copy(
            disk,
            self._versioned(name, version),
            DiskKind.IMAGE,
            encryption_set=encryption_set,
            image_format=image_format,
            place=place,
        )
        return self._copies.copy([new], quiesce=quiesce, progress=progress).disks[0]

    def import_image(
        self,
        name: str,
        source: Path,
        *,
        version: int | None = None,
        encryption_set: str | None = None,
        image_format: DiskFormat = DiskFormat.QCOW2,
        place: Path | StoragePool | None = None,
        source_format: str | None = None,
        with_backing: bool = False,
        progress: Progress = silent,
    ) -> Disk:
        """Make an image of a foreign image; see :meth:`Transfer.import_image`."""
        new = NewDisk(
            name=self._versioned(name, version),
            kind=DiskKind.IMAGE,
            format=image_format,
            encryption_set=encryption_set,
            place=place,
        )
        return self._transfer.import_image(
            new, source, source_format=source_format, with_backing=with_backing, progress=progress
        )

    def new_disk(self, name: str, new: NewDisk, *, progress: Progress = silent) -> Disk:
        """Make a disk with the content of an image: an independent copy.

        :param new: name and properties; without a set, the disk is in the image's; without a size, the disk
            is as large as the image.
        :raise InvalidValueError: When the disk would be smaller than the image.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        image = self.get(name)
        if new.size is not None and new.size < image.size:
            raise InvalidValueError(f"image {image.name!r} has {image.size} bytes, more than {new.size}")
        copy = new_copy(
            image,
            new.name,
            DiskKind.DISK,
            encryption_set=new.encryption_set,
            image_format=new.format,
            place=new.place,
        )
        cipher = new.infrastructure_cipher or copy.infrastructure_cipher
        copy = dataclasses.replace(copy, size=new.size, sku=new.sku, infrastructure_cipher=cipher)
        return self._copies.copy([copy], progress=progress).disks[0]

    def new_clone(self, name: str, new: NewDisk) -> Disk:
        """Make a linked clone of an image: a disk that is read from the image where nothing was written yet.

        Takes no time for the image's content. The clone has DEKs and a volume key of its own, and is in the
        image's set.

        :param new: as of :meth:`new_disk`.
        :raise InvalidValueError: When the clone would be smaller than the image, or no qcow2 image.
        :raise PolicyError: When another set is given.
        :raise VirtSseError: As :meth:`Disks.create`.
        """
        image = self.get(name)
        if new.format is not DiskFormat.QCOW2:
            raise InvalidValueError(
                "a linked clone has the format qcow2: a raw image holds all of its content",
                hint="leave out --linked: the disk is then a full copy",
            )
        if new.size is not None and new.size < image.size:
            raise InvalidValueError(f"image {image.name!r} has {image.size} bytes, more than {new.size}")
        if new.encryption_set is not None:
            chosen = self._store.encryption_sets.get(new.encryption_set)
            if chosen.id != image.set_id:
                raise PolicyError(
                    f"a linked clone is in the set of its image {image.name!r}, not in {chosen.name!r}",
                    hint="leave out --linked: the disk is then a full copy",
                )
        self._freshness.check(image)
        infrastructure = image.deks[-1].cipher if len(image.deks) > 1 else None
        return self._disks.create(
            dataclasses.replace(
                new,
                size=new.size or image.size,
                encryption_set=str(image.set_id) if image.set_id else None,
                cipher=image.deks[0].cipher,
                infrastructure_cipher=new.infrastructure_cipher or infrastructure,
                source=image,
                base=image,
            )
        )

    def clones(self, image: Disk) -> list[Disk]:
        """The linked clones of an image, by name."""
        return self._store.based_on(image.id)

    def delete(self, name: str, *, dry_run: bool = False, force: bool = False) -> list[Disk]:
        """Erase a version of an image for good; see :meth:`Disks.erase`. Full copies of it are independent.

        :param name: with the version, or an id.
        :param force: erase all linked clones of the image, too, which cannot be read without it.
        :return: what was erased: the linked clones, and last the image.
        :raise InvalidValueError: When *name* has no version.
        :raise DiskInUseError: When the image has linked clones, without *force*; or a domain has one of them.
        """
        if self.versions(name):
            raise InvalidValueError(
                f"image {name!r} has versions", hint=f"name one of them: '{name}:VERSION'"
            )
        image = self.get(name)
        clones = self.clones(image)
        if clones and not force:
            raise DiskInUseError(
                f"image {image.name!r} has linked clones, unreadable without it: "
                + ", ".join(clone.name for clone in clones),
                hint="'virt-sse disk reencrypt' makes a clone independent; --force deletes the clones, too",
            )
        for is_trial in (True,) if dry_run else (True, False):  # nothing is erased unless all can be
            for clone in clones:
                self._disks.delete(clone.name, dry_run=is_trial)
            self._disks.erase(image, dry_run=is_trial, after=clones)
        return [*clones, image]

    def _versioned(self, name: str, version: int | None) -> str:
        if version is None:
            versions = self.versions(name)
            version = _version(versions[-1]) + 1 if versions else 1
        return check_name(f"{name}:{version}", DiskKind.IMAGE)


def _base(image: Disk) -> str:
    return image.name.rpartition(":")[0]


def _version(image: Disk) -> int:
    return int(image.name.rpartition(":")[2])
