"""Snapshots: copies of one disk, or of all disks of a domain at one point in time."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from virt_sse.disks.copies import Copied, Copies, new_copy
from virt_sse.disks.increments import incremental
from virt_sse.disks.lifecycle import Disks
from virt_sse.errors import DiskNotFoundError
from virt_sse.keys.host import Host
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, NewDisk, StoragePool, check_kind
from virt_sse.system.progress import Progress, silent


class DomainDisks(Protocol):
    """The disks of ours in domains."""

    def of_domain(self, domain: str) -> Sequence[tuple[str, uuid.UUID]]:
        """Targets and ids of the disks of ours in a domain, running or defined.

        :raise LibvirtError: When no such domain exists.
        """


class Snapshots:
    """Takes, restores and deletes snapshots. Methods take a snapshot's name or id."""

    def __init__(self, host: Host, disks: Disks, copies: Copies, domains: DomainDisks) -> None:
        self._host = host
        self._store = host.store
        self._disks = disks
        self._copies = copies
        self._domains = domains

    def get(self, name: str) -> Disk:
        """The snapshot of that name or id.

        :raise DiskNotFoundError: When there is no such snapshot.
        :raise DiskStateError: When the name is that of a disk or of another copy.
        """
        snapshot = self._store.get(name)
        check_kind(snapshot, DiskKind.SNAPSHOT)
        return snapshot

    def of_disk(
        self,
        name: str,
        disk: str,
        *,
        image_format: DiskFormat | None = None,
        place: Path | StoragePool | None = None,
        is_incremental: bool = False,
        quiesce: bool | None = None,
        progress: Progress = silent,
    ) -> Copied:
        """Take a snapshot of one disk, running or not.

        :param place: as of :class:`NewDisk`; default: beside the disk's image.
        :param is_incremental: store what changed since the disk's newest snapshot, if there is one.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        source = self._store.get(disk)
        check_kind(source, DiskKind.DISK)
        new = new_copy(source, name, DiskKind.SNAPSHOT, image_format=image_format, place=place)
        return self._copy([new], is_incremental=is_incremental, quiesce=quiesce, progress=progress)

    def _copy(
        self, new: list[NewDisk], *, is_incremental: bool, quiesce: bool | None, progress: Progress
    ) -> Copied:
        reasons = {}
        if is_incremental:
            for number, each in enumerate(new):
                new[number], reason = incremental(self._host, each)
                if reason:
                    reasons[each.name] = reason
        copied = self._copies.copy(new, quiesce=quiesce, progress=progress)
        return dataclasses.replace(copied, full=reasons)

    def of_domain(
        self,
        name: str,
        domain: str,
        *,
        is_incremental: bool = False,
        quiesce: bool | None = None,
        progress: Progress = silent,
    ) -> Copied:
        """Take snapshots of all disks of ours in a domain, at one point in time, or none.

        Each snapshot is called after *name* and the disk's target, as in ``name-vda``.

        :param is_incremental: as of :meth:`of_disk`, for each disk.
        :raise DiskNotFoundError: When the domain has no disk of ours.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        point = uuid.uuid4()
        new: list[NewDisk] = []
        for target, disk_id in self._domains.of_domain(domain):
            copy = new_copy(self._store.get(str(disk_id)), f"{name}-{target}", DiskKind.SNAPSHOT)
            new.append(dataclasses.replace(copy, point=point))
        if not new:
            raise DiskNotFoundError(f"domain {domain!r} has no disk of virt-sse")
        return self._copy(new, is_incremental=is_incremental, quiesce=quiesce, progress=progress)

    def restore(
        self,
        name: str,
        disk: str,
        *,
        encryption_set: str | None = None,
        image_format: DiskFormat | None = None,
        place: Path | StoragePool | None = None,
        progress: Progress = silent,
    ) -> Disk:
        """Make the new disk *disk* with the content of a snapshot, of the same size.

        :param encryption_set: default: the snapshot's.
        :raise VirtSseError: As :meth:`Copies.copy`.
        """
        new = new_copy(
            self.get(name),
            disk,
            DiskKind.DISK,
            encryption_set=encryption_set,
            image_format=image_format,
            place=place,
        )
        return self._copies.copy([new], progress=progress).disks[0]

    def delete(self, name: str, *, dry_run: bool = False) -> Disk:
        """Erase a snapshot for good; see :meth:`Disks.erase`. Restored disks are independent of snapshots.

        :raise DiskInUseError: When incremental snapshots are based on it.
        """
        snapshot = self.get(name)
        self._disks.erase(snapshot, dry_run=dry_run)
        return snapshot
