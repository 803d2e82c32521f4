"""New domains with disks: ``virt-sse vm create``. All is made, or nothing stays behind.

A record names the domain and the new disks before the first of them exists, and is removed when all is
complete. Whatever a record names is undone: by the command itself after an error, after a kill by the next
command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

import libvirt

from virt_sse.disks.lifecycle import Disks
from virt_sse.domains.domain_records import NewDomain, new_domain_records
from virt_sse.domains.hotplug import Hotplug
from virt_sse.domains.settings import VmChanges, VmSettings
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    InvalidValueError,
    LibvirtUnavailableError,
    VirtSseError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit, with_uuid
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.disks import NewDisk
from virt_sse.model.layers import HostCaching
from virt_sse.system.locks import DiskLocks

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DomainDiskChoice:
    """A disk for a new domain.

    :ivar disk: name or id of an existing disk, or a disk to be created.
    :ivar target: the disk's name in the guest; default: the first free name on *bus*.
    """

    disk: str | NewDisk
    target: str | None = None
    bus: DiskBus | None = None
    read_only: bool = False
    caching: HostCaching = HostCaching.NONE


class NewDomains:
    """Defines domains together with their disks."""

    def __init__(
        self, host: Host, disks: Disks, start: DomainStart, hotplug: Hotplug, vms: VmSettings
    ) -> None:
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._records = new_domain_records(host.config)
        self._disks = disks
        self._start = start
        self._hotplug = hotplug
        self._vms = vms
        self._locks = DiskLocks(host.config.state_directory / "new-domains.lock")

    def create(
        self,
        xml: str,
        choices: Sequence[DomainDiskChoice],
        *,
        encryption_at_host: bool = False,
        start: bool = False,
    ) -> str:
        """Define a domain, and add disks to its definition.

        :param xml: the definition, without disks of virt-sse; gets a UUID unless it has one.
        :param choices: the disks, in the order of their names in the guest.
        :param start: start the domain, too.
        :return: the domain's name.
        :raise InvalidValueError: When *xml* is invalid, or has disks or settings of virt-sse.
        :raise VmStateError: When libvirt has a domain of the same name or UUID.
        :raise VirtSseError: As ``disk create``, ``disk attach`` and ``vm update``; nothing is left behind.
        """
        definition = new_definition(xml)
        planned = [
            dataclasses.replace(each, disk=dataclasses.replace(each.disk, id=uuid.uuid4()))
            if isinstance(each.disk, NewDisk)
            else each
            for each in choices
        ]
        new = [each.disk for each in planned if isinstance(each.disk, NewDisk)]
        with self._locked(definition), connected(self._uri) as connection:
            _refuse_existing(connection, definition)
            record = NewDomain(disks=tuple(disk.id for disk in new if disk.id))
            self._records.put(definition.uuid, record)
            try:
                connection.defineXMLFlags(definition.to_xml(), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
                if encryption_at_host:
                    self._vms.update(definition.name, VmChanges(encryption_at_host=True))
                for disk in new:
                    self._disks.create(disk)
                for each in planned:
                    self._attach(definition.name, each)
                if start:
                    domains.lookup(connection, definition.name).create()
            except BaseException:
                with contextlib.suppress(
                    VirtSseError, libvirt.libvirtError
                ):  # the record stays: undone later
                    self._records.put(definition.uuid, record)  # a start removes the record
                    self._undo(connection, definition.uuid, record)
                raise
            self._records.remove(definition.uuid)
        return definition.name

    @contextlib.contextmanager
    def _locked(self, definition: DomainDefinition) -> Iterator[None]:
        """Exclude other commands that make the domain.

        :raise VmStateError: When another command makes the domain.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._locks.hold(definition.uuid))
            except DiskInUseError as exc:
                raise VmStateError(f"another command is making domain {definition.name!r}") from exc
            yield

    def definition(self, xml: str, choices: Sequence[DomainDiskChoice]) -> str:
        """The definition with existing disks added, as text; nothing changes.

        :raise VirtSseError: As :meth:`create`.
        """
        edit = DomainEdit(new_definition(xml))
        for each in choices:
            if isinstance(each.disk, NewDisk):
                raise InvalidValueError(f"disk {each.disk.name!r} does not exist yet")
            target = each.target or edit.free_target(each.bus or DiskBus.VIRTIO)
            edit.add_disk(
                self._start.disk_element(each.disk, target=target, bus=each.bus, read_only=each.read_only)
            )
        return edit.result().to_xml()

    def _attach(self, domain: str, choice: DomainDiskChoice) -> None:
        self._hotplug.attach(
            choice.disk.name if isinstance(choice.disk, NewDisk) else choice.disk,
            domain,
            target=choice.target,
            bus=choice.bus,
            read_only=choice.read_only,
            caching=choice.caching,
        )

    def recover(self) -> None:
        """Undo the work of killed commands, once libvirt answers; what cannot be undone now is logged."""
        for domain_id, _ in list(self._records.all()):
            try:
                with self._locks.hold(domain_id):
                    record = self._records.get(domain_id)
                    if record is not None:
                        with connected(self._uri) as connection:
                            self._undo(connection, domain_id, record)
            except (DiskInUseError, LibvirtUnavailableError):
                continue
            except VirtSseError as exc:
                _log.warning("the unfinished domain %s stays: %s", domain_id, exc)

    def _undo(self, connection: libvirt.virConnect, domain_id: UUID, record: NewDomain) -> None:
        """Undefine the domain, and delete its new disks. A domain that runs stays, with its disks."""
        domain = domains.find(connection, domain_id)
        if domain is None or not domains.is_active(domain):
            if domain is not None:
                with domains.gone_is_fine():
                    for use in domains.definition(domain, inactive=True).our_disks:
                        self._store.vms.set_caching(use.disk_id, HostCaching.NONE)
                    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
            self._store.vms.remove(domain_id)
            for disk_id in record.disks:
                with contextlib.suppress(DiskNotFoundError):
                    self._disks.delete(str(disk_id))
        self._records.remove(domain_id)


def new_definition(xml: str) -> DomainDefinition:
    """Check a definition for a new domain; a definition without a UUID gets one.

    :raise InvalidValueError: When *xml* is no domain XML, has no name, or disks or settings of virt-sse.
    """
    definition = DomainDefinition.parse(xml)
    if definition.mentions_us:
        raise InvalidValueError(
            "the definition has disks or settings of virt-sse", hint="name its disks with --disk instead"
        )
    if not definition.name:
        raise InvalidValueError("invalid domain XML: no <name>")
    return with_uuid(definition)


def _refuse_existing(connection: libvirt.virConnect, definition: DomainDefinition) -> None:
    """Refuse a definition that libvirt would take as a change of a domain."""
    for domain in connection.listAllDomains():
        with domains.gone_is_fine():
            if domain.name() == definition.name or UUID(bytes=domain.UUID()) == definition.uuid:
                raise VmStateError(
                    f"libvirt has a domain {domain.name()!r} with this name or UUID",
                    hint="choose another name; 'virt-sse disk attach' adds a disk to an existing domain",
                )
