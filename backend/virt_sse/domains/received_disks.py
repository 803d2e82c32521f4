"""Disks of this host that receive the content of the disks of a domain that migrates here.

The operator prepares the disks (:mod:`virt_sse.disks.receiving`). ``virsh migrate --copy-storage-all`` fills
them: libvirt's mirror writes through QEMU, or through the storage processes, which encrypt with the disks'
own keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from uuid import UUID

from virt_sse.disks.stored_images import waiting
from virt_sse.domains.disk_sources import DiskSources
from virt_sse.domains.incoming import IncomingDomains
from virt_sse.errors import DiskStateError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DiskSource
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.model.disks import Disk
from virt_sse.qemu import image_file


class ReceivedDisks:
    """The disks of this host in state ``receiving``. Without a shared store, there are none."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._sources = DiskSources(host)
        self._incoming = IncomingDomains(host.config)

    def in_place(self, definition: DomainDefinition) -> DomainDefinition:
        """Put the disks that wait for the content of a domain's disks in the places of the latter.

        :raise DiskStateError: When such a disk was not made on this host, or has another size or host caching
            than the domain's disk.
        :raise DiskInUseError: When a QEMU process has such a disk's image open.
        :raise StoreError: When the store fails.
        """
        if not self._host.leases.are_shared:
            return definition
        store = self._host.opened_store.full()
        sources: dict[UUID | None, DiskSource] = {}
        for source in store.with_ids({use.disk_id for use in definition.our_disks}):
            if disk := waiting(self._host, source):
                self._refuse_foreign(disk)
                _refuse_different(disk, source)
                image_file.refuse_if_open(disk.path)
                sources[source.id] = self._sources.source(disk)
        return _with_sources(definition, sources)

    def _refuse_foreign(self, disk: Disk) -> None:
        """Refuse a disk of which the store alone says that the disk was made here.

        :raise DiskStateError: When this host has not sealed the disk's image.
        """
        if not (self._host.config.image_states / str(disk.id)).exists():
            raise DiskStateError(
                f"disk {disk.name!r} was not made by 'virt-sse disk receive' on this host",
                hint=f"'virt-sse disk delete {disk.name}', and prepare a disk on this host",
            )

    def due(self, definition: DomainDefinition) -> frozenset[UUID]:
        """The disks that :meth:`complete` would make ready; none if the note about the migration is damaged.

        :param definition: of an active domain.
        """
        note = None
        with contextlib.suppress(VmStateError):
            note = self._incoming.find(definition.uuid)
        return note.received if note and note.token == definition.migration_token else frozenset()

    def complete(self, definition: DomainDefinition) -> None:
        """Make the received disks ready of a domain that has migrated to this host, and runs here.

        The disks also take their places in the persistent definition, which libvirt has from the source. A
        killed call is repeated.

        :raise DiskInUseError: When another host has a disk's lease.
        :raise LibvirtError: When libvirt does not answer.
        :raise libvirt.libvirtError: When libvirt refuses.
        :raise VmStateError: When the note about the migration cannot be written.
        :raise StoreError: When the store fails.
        """
        received = self._host.store.with_ids(self.due(definition))
        sources = {disk.source_id: self._sources.source(disk) for disk in received}
        with connected(self._host.config.libvirt_uri) as connection:
            domain = domains.find(connection, definition.uuid)
            if domain is not None and domain.isPersistent():
                persistent = domains.definition(domain, inactive=True, secure=True)
                changed = _with_sources(persistent, sources)
                if changed is not persistent:
                    connection.defineXML(changed.to_xml())
        for disk in received:
            with (
                self._host.locks.hold(disk.id, wait=True),  # gives the lease of the waiting disk back
                contextlib.suppress(DiskStateError),  # ready, by a killed call
            ):
                self._host.store.set_received(disk.id)
        self._incoming.note_received(definition.uuid)


def _with_sources(
    definition: DomainDefinition, sources: Mapping[UUID | None, DiskSource]
) -> DomainDefinition:
    """The definition with other disks, by the ids of its disks; without the backing files of the latter."""
    edit = DomainEdit(definition)
    for use in definition.our_disks:
        if use.disk_id in sources:
            edit.encrypt_disk(use.target, sources[use.disk_id])
    return edit.result()


def _refuse_different(disk: Disk, source: Disk) -> None:
    for what, ours, theirs in (
        ("size", disk.size, source.size),
        ("host caching", disk.caching.value, source.caching.value),
    ):
        if ours != theirs:
            raise DiskStateError(
                f"disk {disk.name!r} has {what} {ours}, "
                f"and disk {source.name!r}, whose content is to come, has {what} {theirs}",
                hint=f"'virt-sse disk delete {disk.name}', and 'virt-sse disk receive {source.name}' again",
            )
