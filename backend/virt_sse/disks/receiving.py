"""New, empty disks for the content of disks whose domain is about to migrate to this host.

The new disk has an id, DEKs and an image of its own; no key of the other disk is used. Where hosts do not
share the storage of images, ``virsh migrate --copy-storage-all`` fills the disk.
"""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path

from virt_sse.disks.copies import new_copy
from virt_sse.disks.creation import Successor
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import waiting
from virt_sse.errors import DiskExistsError, DiskInUseError, InvalidValueError
from virt_sse.keys.host import Host
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, StoragePool, check_kind, state_error


class Receiving:
    """Prepares disks in state ``receiving``."""

    def __init__(self, host: Host, disks: Disks) -> None:
        self._host = host
        self._store = host.store
        self._locks = host.locks
        self._leases = host.leases
        self._disks = disks

    def prepare(
        self, name: str, *, new_name: str | None = None, place: Path | StoragePool | None = None
    ) -> Disk:
        """Create an empty disk on this host for the content of another disk of the same size and ciphers.

        A command killed at its end may leave a disk that is ready and empty.

        :param name: name or id of the other disk.
        :param new_name: default: the name, a dot, and this host's name.
        :raise InvalidValueError: When the store is not shared by hosts.
        :raise DiskInUseError: When the disk is in use on this host.
        :raise DiskExistsError: When a disk of this host waits for the content already, or the name is taken.
        :raise VirtSseError: As :meth:`Disks.create`.
        """
        if not self._leases.are_shared:
            raise InvalidValueError(
                "the store is not shared: no domain with a disk of this store runs on another host",
                hint="'virt-sse disk adopt' adds a copied image of another store",
            )
        source = self._store.get(name)
        check_kind(source, DiskKind.DISK)
        if source.state is not DiskState.READY:
            raise state_error(source)
        if source.id in {use.resource_id for use in self._leases.uses()}:
            raise DiskInUseError(
                f"disk {source.name!r} is in use on this host", hint="run the command on the destination"
            )
        if disk := waiting(self._host, source):
            raise DiskExistsError(f"disk {disk.name!r} waits for the content of disk {source.name!r} already")
        host_name = self._leases.identity.name.partition(".")[0]
        new = new_copy(source, new_name or f"{source.name}.{host_name}", DiskKind.DISK, place=place)
        successor = Successor(uuid.uuid4(), new.name, source.guest_serial)
        disk = self._disks.create(dataclasses.replace(new, size=source.size), successor=successor)
        with self._locks.hold(disk.id):  # this host keeps the lease, see HostStore.end_work
            self._store.vms.set_caching(disk.id, source.caching)
            self._store.set_state(disk.id, DiskState.RECEIVING)
        return self._store.get(str(disk.id))
