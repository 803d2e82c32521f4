"""Deleted disks that can be recovered: until the end of a retention time, or until the disks are purged.

A deleted disk keeps its name, its image, its wrapped DEKs and its encryption set: rotation rewraps its DEKs,
and its set cannot be deleted. No domain and no command uses the disk.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from virt_sse.disks.erasure import Erasure
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import image_state, usable
from virt_sse.errors import DiskNotFoundError, DiskStateError, ImageError, VirtSseError
from virt_sse.keys.access import DELETE, RECOVER
from virt_sse.keys.host import Host
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, check_kind
from virt_sse.qemu import image_file

_log = logging.getLogger(__name__)


class SoftDeletion:
    """Deletes disks for a time, recovers and purges deleted disks. Methods take a disk's name or id.

    :raise DiskNotFoundError: When the store has no such disk.
    """

    def __init__(self, host: Host, disks: Disks, erasure: Erasure) -> None:
        self._host = host
        self._store = host.store
        self._keys = host.keys
        self._disks = disks
        self._erasure = erasure

    @property
    def retention(self) -> timedelta:
        """How long a deleted disk can be recovered; nothing: disks are deleted for good."""
        return timedelta(days=self._host.config.retention_days)

    def all(self) -> list[Disk]:
        """All deleted disks, by name."""
        return self._store.deleted()

    def delete(self, name: str, *, dry_run: bool = False) -> Disk:
        """Delete a disk for the retention time; for good, if there is none or the disk has no image.

        :param dry_run: check only.
        :return: the disk; without a time of its purge if deleted for good.
        :raise DiskInUseError: When a domain, running or defined, has the disk, or QEMU has the image open.
        :raise LibvirtUnavailableError: When libvirt does not answer.
        :raise DiskStateError: When the disk is not ready, e.g. deleted already.
        :raise ImageError: When the file at the disk's path is not its image.
        :raise AuditError: When the deletion cannot be recorded; nothing has been done then.
        """
        disk = self._disks.unattached(name)
        if disk.state is DiskState.RECEIVING:  # has no content to be recovered
            self._erasure.erase(disk, dry_run=dry_run)
            return disk
        with usable(self._host, disk) as current:
            if self.retention and image_file.exists(current.path):
                self._erasure.check(current)
                now = datetime.now(UTC).replace(microsecond=0)
                purge = now + self.retention
                if not dry_run:
                    self._keys.note(DELETE, current, f"recoverable until {purge.isoformat()}")
                    self._store.set_deleted(current.id, now, purge)
                return replace(current, state=DiskState.DELETED, deleted=now, scheduled_purge=purge)
        self._erasure.erase(disk, dry_run=dry_run)
        return disk

    def recover(self, name: str) -> Disk:
        """Make a deleted disk usable again.

        :raise DiskStateError: When the disk is not deleted.
        :raise ImageError: When the disk's image is missing, damaged, or the image of another disk.
        :raise KeyProviderError: When a DEK cannot be unwrapped, e.g. because its key is disabled.
        :raise AuditError: When the recovery cannot be recorded; nothing has been done then.
        """
        with usable(self._host, self._deleted(name), DiskState.DELETED) as current:
            if (state := image_state(current)) != "present":
                raise ImageError(
                    f"disk {current.name!r} cannot be recovered: {state}",
                    hint=f"bring the image back; without it, 'virt-sse disk purge {current.name}'",
                )
            self._keys.unwrap_all(current)
            self._keys.note(RECOVER, current, f"image {current.path}")
            self._store.set_recovered(current.id)
        return self._store.get(str(current.id))

    def purge(self, name: str, *, dry_run: bool = False, certified: bool = False) -> Disk:
        """Erase a deleted disk for good; see :meth:`Erasure.erase`. No domain can be using the disk.

        :raise DiskStateError: When the disk is not deleted.
        :raise VirtSseError: As :meth:`Erasure.erase`.
        """
        disk = self._deleted(name)
        self._erasure.erase(disk, dry_run=dry_run, certified=certified)
        return disk

    def due(self) -> list[Disk]:
        """The deleted disks of this host whose retention time is over, by name.

        Of a store shared by hosts, each host purges only disks whose images it has or had.
        """
        now = datetime.now(UTC)
        return [
            disk
            for disk in self.all()
            if disk.scheduled_purge and disk.scheduled_purge <= now and self._is_here(disk)
        ]

    def purge_due(self) -> tuple[list[Disk], dict[str, str]]:
        """Purge the disks whose retention time is over, each with a certificate.

        :return: the purged disks; and the error message by name of those that could not be purged.
        """
        done, failed = [], {}
        for disk in self.due():
            try:
                done.append(self.purge(str(disk.id), certified=True))
            except (DiskNotFoundError, DiskStateError):
                continue  # purged or recovered meanwhile
            except VirtSseError as exc:
                failed[disk.name] = str(exc)
            except Exception as exc:  # noqa: BLE001 -- one disk must not stop the purge of the others
                _log.exception("disk %s cannot be purged", disk.name)
                failed[disk.name] = f"unexpected {type(exc).__name__}"
        return done, failed

    def _is_here(self, disk: Disk) -> bool:
        """Whether this host has the disk's image, or used the image before it was lost."""
        return image_file.exists(disk.path) or (self._host.config.image_states / str(disk.id)).exists()

    def _deleted(self, name: str) -> Disk:
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        if disk.state is not DiskState.DELETED:
            raise DiskStateError(
                f"disk {disk.name!r} is not deleted, but {disk.state.value}",
                hint=f"'virt-sse disk delete {disk.name}' deletes the disk",
            )
        return disk
