"""Restoration in place: a new disk with the content of a snapshot takes the place of the snapshot's disk."""

from __future__ import annotations

import uuid

from virt_sse.disks.copies import Copies
from virt_sse.disks.creation import Successor
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import usable
from virt_sse.errors import DiskInUseError, DiskStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_users
from virt_sse.libvirt.connection import connected
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disk_lines import owners
from virt_sse.model.disks import Disk, NewDisk, check_kind
from virt_sse.model.layers import HostCaching
from virt_sse.model.operations import DeleteDisk
from virt_sse.model.replacements import Replacement
from virt_sse.qemu import image_file
from virt_sse.replacement.offline import Bars, copy_offline
from virt_sse.replacement.settlement import Settlement
from virt_sse.system.block_devices import is_device
from virt_sse.system.rbd_names import is_rbd


class Restoration:
    """Restores disks in place; a killed restoration is finished or undone by the next command."""

    def __init__(self, host: Host, disks: Disks, copies: Copies, settlement: Settlement) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._plugins = host.plugins
        self._disks = disks
        self._copies = copies
        self._settlement = settlement

    def restore(self, snapshot_name: str, disk_name: str, bars: Bars, *, dry_run: bool = False) -> Disk:
        """Put the content of a snapshot into its disk; the disk's present content is crypto-erased.

        The disk keeps name, path, encryption set, ciphers, serial number and domains, and has the snapshot's
        size. Its DEKs are new.

        :param dry_run: check only.
        :return: the disk; with *dry_run*, as before.
        :raise DiskInUseError: When a domain with the disk runs, or another command is at work on either.
        :raise DiskStateError: When the snapshot is not one of this disk, or either is not ready.
        :raise VirtSseError: By meaning; the disk is then as before.
        """
        snapshot, disk = self._store.get(snapshot_name), self._store.get(disk_name)
        check_kind(snapshot, DiskKind.SNAPSHOT)
        check_kind(disk, DiskKind.DISK)
        with usable(self._host, disk) as current, usable(self._host, snapshot) as source:
            owner = owners(self._store.all()).get(source.id)
            if owner is None or owner.id != current.id:
                raise DiskStateError(
                    f"{source.name!r} is no snapshot of disk {current.name!r}",
                    hint="without --in-place, a snapshot is restored into a new disk",
                )
            if is_device(current.path) or is_rbd(current.path):
                place = "in Ceph" if is_rbd(current.path) else "on a block device"
                raise DiskStateError(
                    f"disk {current.name!r} is {place}, at {current.path}: no copy can take its place",
                    hint="without --in-place, a snapshot is restored into a new disk",
                )
            self._refuse_running(current)
            self._plugins.validate(DeleteDisk(current))
            self._host.freshness.check(source)
            content = self._copies.content_of(source)
            if dry_run:
                return current
            copy_id = uuid.uuid4()
            infrastructure = current.deks[-1].cipher if len(current.deks) > 1 else None
            new = NewDisk(
                name=f"{current.name[:60]}.copy-{copy_id.hex[:8]}",
                size=source.size,
                format=current.format,
                sku=current.sku,
                encryption_set=str(current.set_id) if current.set_id else None,
                cipher=current.deks[0].cipher,
                infrastructure_cipher=infrastructure,
                place=current.path.with_name(f"{current.name}-{copy_id.hex[:8]}.{current.format.value}"),
                source=source,
            )
            copy = Replacement(
                disk_id=copy_id, name=current.name, source_id=current.id, final_path=current.path
            )
            self._store.replacements.begin(copy)
            with self._settlement.undone_after_failure(copy):
                self._disks.create(
                    new,
                    content=self._copies.findings_in(source),
                    successor=Successor(copy_id, current.name, current.guest_serial),
                )
                if current.caching is not HostCaching.NONE:
                    self._store.vms.set_caching(copy_id, current.caching)
                self._store.replacements.reserve(copy)
                copy_offline(self._host, copy, content, bars, None)
                self._store.replacements.take_over(copy)
            self._settlement.finish_or_leave(copy)
            return self._store.get(str(copy_id))

    def _refuse_running(self, disk: Disk) -> None:
        with connected(self._uri) as connection:
            running = [each.name() for each in disk_users.using(connection, disk.id) if each.isActive()]
        if running:
            raise DiskInUseError(
                f"domain {running[0]!r} runs with disk {disk.name!r}",
                hint="a guest cannot go on with other content: stop the domain first",
            )
        image_file.refuse_if_open(disk.path)
