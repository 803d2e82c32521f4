"""Restore points: backups of disks in folders elsewhere, verified and restored."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from pathlib import Path

from virt_sse.disks import backup_manifest
from virt_sse.disks.copies import Copied, Copies, new_copy
from virt_sse.disks.creation import Unfinished
from virt_sse.disks.increments import incremental
from virt_sse.disks.lifecycle import Disks
from virt_sse.errors import DiskNotFoundError, ImageError
from virt_sse.keys.copy_chains import copies_below
from virt_sse.keys.host import Host
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, StoragePool, check_kind, check_path
from virt_sse.model.keys import Dek
from virt_sse.system.progress import Progress, silent


class RestorePoints:
    """Makes, restores and erases restore points, given by name, by id, or by the path of the image."""

    def __init__(self, host: Host, disks: Disks, copies: Copies) -> None:
        self._host = host
        self._store = host.store
        self._keys = host.keys
        self._disks = disks
        self._copies = copies

    def create(
        self,
        disk: str,
        folder: Path,
        *,
        encryption_set: str | None = None,
        is_incremental: bool = False,
        quiesce: bool | None = None,
        progress: Progress = silent,
    ) -> Copied:
        """Make a restore point of a disk, running or not: an image and its manifest in *folder*.

        :param encryption_set: any set; default: the disk's.
        :param is_incremental: store what changed since the disk's newest restore point in *folder*, if any.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        source = self._store.get(disk)
        check_kind(source, DiskKind.DISK)
        name = f"{source.name[:60]}.{_moment()}"
        new = new_copy(
            source,
            name,
            DiskKind.RESTORE_POINT,
            encryption_set=encryption_set,
            place=folder / f"{name}.{source.format.value}",
        )
        reasons: dict[str, str] = {}
        below: backup_manifest.BackupManifest | None = None
        if is_incremental:
            within = check_path(folder)
            based, reason = incremental(self._host, new, suits=lambda point: point.path.parent == within)
            if based.base:
                try:
                    below = backup_manifest.read(based.base, self._dek(based.base))
                    new = based
                except ImageError as exc:
                    reason = str(exc)
            reasons = {name: reason} if reason else {}

        def complete(made: Unfinished) -> None:
            backup_manifest.write(made.disk, made.image, made.deks[0], base=below)

        copied = self._copies.copy([new], quiesce=quiesce, progress=progress, complete=complete)
        return dataclasses.replace(copied, full=reasons)

    def _dek(self, point: Disk) -> Dek:
        return self._keys.unwrap_slot(point, point.deks[0].slot)

    def get(self, point: str) -> Disk:
        """The restore point with this name, id, or path of its image.

        :raise DiskNotFoundError: When the store has no such restore point.
        :raise DiskStateError: When the name is that of a disk or of another copy.
        """
        found = self._store.find_by_path(check_path(Path(point))) if os.sep in point else None
        found = found or self._store.get(point)
        check_kind(found, DiskKind.RESTORE_POINT)
        return found

    def verify(self, point: str) -> Disk:
        """Compare the image of a restore point, and all images below, with their manifests.

        :raise ImageError: When a manifest is missing or invalid, or an image differs.
        :raise VirtSseError: As :func:`copies_below`.
        """
        found = self.get(point)
        above: backup_manifest.BackupManifest | None = None
        for each in (found, *copies_below(self._host, found)):
            above = backup_manifest.verify(each, self._dek(each), above=above)
        return found

    def restore(
        self,
        point: str,
        disk: str,
        *,
        encryption_set: str | None = None,
        trust: bool = False,
        image_format: DiskFormat | None = None,
        place: Path | StoragePool | None = None,
        progress: Progress = silent,
    ) -> Disk:
        """Make the new disk *disk* with the content of a restore point, after verifying the restore point.

        The image of a restore point that the store does not know, given by path, is adopted first, and so are
        the images below in its folder.

        :param encryption_set: of the new disk, and of an adopted restore point; default: as in the image.
        :param trust: as of :meth:`Disks.adopt`.
        :raise ImageError: When the manifest is missing or invalid, or the image differs.
        :raise VirtSseError: As :meth:`Disks.adopt` and :meth:`Copies.copy`.
        """
        try:
            found = self.get(point)
        except DiskNotFoundError:
            if os.sep not in point:
                raise
            found = self._adopt(check_path(Path(point)), encryption_set, trust=trust)
        self.verify(str(found.id))
        new = new_copy(
            found,
            disk,
            DiskKind.DISK,
            encryption_set=encryption_set,
            image_format=image_format,
            place=place,
        )
        return self._copies.copy([new], progress=progress).disks[0]

    def _adopt(self, image: Path, encryption_set: str | None, *, trust: bool) -> Disk:
        """Adopt the image of a restore point, after those below that the store does not know."""
        *above, root = backup_manifest.chain(image)
        adopted = self._known_or_adopted(root, encryption_set, trust=trust)
        for path in reversed(above):
            adopted = self._known_or_adopted(path, encryption_set, trust=trust)
        return adopted

    def _known_or_adopted(self, image: Path, encryption_set: str | None, *, trust: bool) -> Disk:
        found = self._store.find_by_path(image)
        found = found or self._disks.adopt(image, encryption_set=encryption_set, trust=trust)
        check_kind(found, DiskKind.RESTORE_POINT)
        return found

    def erase(self, point: str, *, dry_run: bool = False) -> Disk:
        """Crypto-erase a restore point, alone; see :meth:`Disks.erase`.

        :raise DiskInUseError: When incremental restore points are based on it.
        """
        found = self.get(point)
        self._disks.erase(found, dry_run=dry_run)
        return found


def _moment() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
