"""Scale sets: many domains from one definition, each with a copy of one disk.

What is wanted is in the store before the first step: the number of instances, and for each instance the ids
of its domain and its disk. :meth:`ScaleSets._reconcile` makes what is missing and removes what is too much,
and so finishes the work of a killed command.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import libvirt

from virt_sse.disks.copies import Copies
from virt_sse.disks.lifecycle import Disks
from virt_sse.domains.settings import VmChanges, VmSettings
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    InvalidValueError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.instance_definition import instance_xml, template_of
from virt_sse.model.disks import Disk, NewDisk, check_name
from virt_sse.model.scale_sets import MAX_INSTANCES, Instance, ScaleSet
from virt_sse.system.locks import DiskLocks
from virt_sse.system.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class InstanceView:
    """Present state of an instance.

    :ivar is_defined: whether libvirt has the domain.
    :ivar encryption_at_host: by the domain's definition, or as planned for a domain not yet defined.
    """

    instance: Instance
    name: str
    is_defined: bool
    is_active: bool
    encryption_at_host: bool


class ScaleSets:
    """Creates, scales, updates and deletes scale sets. A set is given by its name.

    :raise ScaleSetNotFoundError: When the store has no such set.
    """

    def __init__(self, host: Host, disks: Disks, copies: Copies, start: DomainStart, vms: VmSettings) -> None:
        self._config = host.config
        self._store = host.store
        self._disks = disks
        self._copies = copies
        self._start = start
        self._vms = vms
        self._locks = DiskLocks(host.config.state_directory / "scale-sets.lock")

    def all(self) -> list[ScaleSet]:
        """All sets, by name, as wanted."""
        return self._store.scale_sets.all()

    def create(
        self,
        name: str,
        definition: str,
        image: str,
        *,
        size: int = 0,
        encryption_at_host: bool = False,
        progress: Progress = silent,
    ) -> ScaleSet:
        """Create a set and its instances.

        :param definition: domain XML; name, UUID and MAC addresses in it are ignored.
        :param image: name or id of the disk to be copied for each instance, into the same folder.
        :raise InvalidValueError: When name, definition or size is invalid.
        :raise ScaleSetExistsError: When the name is taken.
        :raise VirtSseError: As :meth:`scale`.
        """
        check_name(f"{name}-{MAX_INSTANCES}")
        scale_set = ScaleSet(
            id=uuid.uuid4(),
            name=name,
            definition=template_of(definition),
            image_id=self._store.get(image).id,
            size=0,
            encryption_at_host=encryption_at_host,
            created=datetime.now(UTC).replace(microsecond=0),
        )
        self._store.scale_sets.add(scale_set)
        return self.scale(name, size, progress=progress)

    def scale(
        self, name: str, size: int | None, *, force: bool = False, progress: Progress = silent
    ) -> ScaleSet:
        """Bring a set to *size* instances, also after an interrupted command; the highest numbers go first.

        :param size: ``None`` keeps the wanted number.
        :param force: destroy running domains that are too many.
        :raise InvalidValueError: When *size* is invalid.
        :raise VmStateError: When a domain that is too many runs, without *force*; nothing has changed then.
        :raise DiskExistsError: When a new instance's name belongs to another disk.
        :raise VirtSseError: When an instance cannot be made or removed; the next command tries again.
        """
        with self._scaling(name, size, force=force) as (connection, scale_set, wanted):
            self._plan(connection, scale_set, wanted)
            self._reconcile(connection, self._store.scale_sets.get(name), progress)
            return self._store.scale_sets.get(name)

    def changes(self, name: str, size: int | None, *, force: bool = False) -> tuple[list[str], list[str]]:
        """The instances that :meth:`scale` would plan anew, and the instances that it would remove.

        :raise VirtSseError: As :meth:`scale`.
        """
        with self._scaling(name, size, force=force) as (connection, scale_set, wanted):
            new = self._new_numbers(connection, scale_set, wanted)
            return [scale_set.instance_name(number) for number in new], _beyond(scale_set, wanted)

    def removals(self, name: str, *, force: bool = False) -> list[str]:
        """The instances that :meth:`delete` would remove.

        :raise VirtSseError: As :meth:`delete`.
        """
        with self._locked(name) as scale_set, connected(self._config.libvirt_uri) as connection:
            if not force:
                self._refuse_running(connection, scale_set, 0)
            return _beyond(scale_set, 0)

    @contextlib.contextmanager
    def _scaling(
        self, name: str, size: int | None, *, force: bool
    ) -> Iterator[tuple[libvirt.virConnect, ScaleSet, int]]:
        """Lock and check a set that is to have *size* instances: connection, set and wanted number."""
        if size is not None and not 0 <= size <= MAX_INSTANCES:
            raise InvalidValueError(f"a scale set cannot have {size} instances", hint=f"0 to {MAX_INSTANCES}")
        with self._locked(name) as scale_set:
            if scale_set.is_deleting:
                raise VmStateError(
                    f"scale set {name!r} is being deleted", hint=f"'virt-sse vmss delete {name}' finishes"
                )
            wanted = scale_set.size if size is None else size
            with connected(self._config.libvirt_uri) as connection:
                if not force:
                    self._refuse_running(connection, scale_set, wanted)
                yield connection, scale_set, wanted

    def update(self, name: str, *, encryption_at_host: bool) -> list[str]:
        """Change what new instances get. Existing instances stay as they are.

        :return: names of the existing instances whose encryption at host differs.
        """
        with self._locked(name) as scale_set:
            self._store.scale_sets.update(scale_set.id, encryption_at_host=encryption_at_host)
        views = self.instances(name)
        return [view.name for view in views if view.encryption_at_host != encryption_at_host]

    def delete(self, name: str, *, force: bool = False, progress: Progress = silent) -> None:
        """Delete a set with its domains and their disks; the copied disk stays.

        :param force: destroy running domains.
        :raise VmStateError: When a domain of the set runs, without *force*; nothing has changed then.
        :raise VirtSseError: When an instance cannot be removed; the next command tries again.
        """
        with self._locked(name) as scale_set, connected(self._config.libvirt_uri) as connection:
            if not force:
                self._refuse_running(connection, scale_set, 0)
            self._store.scale_sets.update(scale_set.id, size=0, is_deleting=True)
            self._reconcile(connection, self._store.scale_sets.get(name), progress)
            self._store.scale_sets.remove(scale_set.id)

    def instances(self, name: str) -> list[InstanceView]:
        """The planned instances of a set, with the state of their domains.

        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        scale_set = self._store.scale_sets.get(name)
        views = []
        with connected(self._config.libvirt_uri) as connection:
            for instance in scale_set.instances:
                domain = domains.find(connection, instance.domain_id)
                at_host = instance.encryption_at_host
                if domain is not None:
                    at_host = domains.definition(domain, inactive=True).has_encryption_at_host
                views.append(
                    InstanceView(
                        instance,
                        scale_set.instance_name(instance.number),
                        is_defined=domain is not None,
                        is_active=domain is not None and domains.is_active(domain),
                        encryption_at_host=at_host,
                    )
                )
        return views

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[ScaleSet]:
        """Lock a set against other commands.

        :raise VmStateError: When another command works on the set.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._locks.hold(self._store.scale_sets.get(name).id))
            except DiskInUseError as exc:
                raise VmStateError(f"another command is at work on scale set {name!r}") from exc
            yield self._store.scale_sets.get(name)

    def _refuse_running(self, connection: libvirt.virConnect, scale_set: ScaleSet, size: int) -> None:
        for instance in scale_set.instances:
            if instance.number > size and domains.runs(connection, instance.domain_id):
                raise VmStateError(
                    f"domain {scale_set.instance_name(instance.number)!r} runs",
                    hint="shut the domain down, or pass --force to destroy the domain",
                )

    def _plan(self, connection: libvirt.virConnect, scale_set: ScaleSet, size: int) -> None:
        """Commit the wanted instances to the store.

        :raise DiskExistsError: When the name of a new instance belongs to another disk or domain.
        """
        new = self._new_numbers(connection, scale_set, size)
        self._store.scale_sets.plan(
            scale_set.id,
            [Instance(n, uuid.uuid4(), uuid.uuid4(), scale_set.encryption_at_host) for n in new],
        )
        self._store.scale_sets.update(scale_set.id, size=size)

    def _new_numbers(self, connection: libvirt.virConnect, scale_set: ScaleSet, size: int) -> list[int]:
        """The numbers of the instances to be planned.

        :raise DiskExistsError: When the name of a new instance belongs to another disk or domain.
        """
        planned = {instance.number for instance in scale_set.instances}
        taken = {domain.name() for domain in connection.listAllDomains()}
        taken |= set(self._store.names())
        new = [number for number in range(1, size + 1) if number not in planned]
        for number in new:
            if (name := scale_set.instance_name(number)) in taken:
                raise DiskExistsError(f"a disk or domain {name!r} exists already")
        return new

    def _reconcile(self, connection: libvirt.virConnect, scale_set: ScaleSet, progress: Progress) -> None:
        """Make missing instances, and remove those that are too many, the highest number first."""
        total = max(1, len(scale_set.instances))
        surplus = [each for each in reversed(scale_set.instances) if each.number > scale_set.size]
        wanted = [each for each in scale_set.instances if each.number <= scale_set.size]
        for done, instance in enumerate(surplus):
            progress(done / total)
            self._remove(connection, scale_set, instance)
        for done, instance in enumerate(wanted, len(surplus)):
            progress(done / total)
            self._make(connection, scale_set, instance)
        progress(1.0)

    def _make(self, connection: libvirt.virConnect, scale_set: ScaleSet, instance: Instance) -> None:
        """Make what an instance lacks: disk, domain, encryption at host.

        :raise DiskNotFoundError: When the domain exists and its disk was deleted by another command.
        """
        name = scale_set.instance_name(instance.number)
        domain = domains.find(connection, instance.domain_id)
        disk = self._disk(instance)
        if disk is None and domain is not None:
            raise DiskNotFoundError(
                f"domain {name!r} of scale set {scale_set.name!r} has lost its disk",
                hint=f"undefine the domain: the next 'virt-sse vmss scale {scale_set.name}' makes both again",
            )
        disk = disk or self._copied(scale_set, instance)
        if domain is None:
            element = self._start.disk_element(str(disk.id))
            xml = instance_xml(scale_set.definition, name=name, domain_id=instance.domain_id, disk=element)
            domain = connection.defineXML(xml)
        if instance.encryption_at_host and not domains.definition(domain).has_encryption_at_host:
            if domains.is_active(domain):
                raise VmStateError(
                    f"domain {name!r} was started before it had encryption at host",
                    hint=f"stop the domain, and repeat 'virt-sse vmss scale {scale_set.name}'",
                )
            self._vms.update(name, VmChanges(encryption_at_host=True))

    def _copied(self, scale_set: ScaleSet, instance: Instance) -> Disk:
        """Make the disk of an instance.

        Each attempt has a new id, committed first: an older image with the id of a deleted disk could pass as
        the image of its successor.
        """
        disk_id = uuid.uuid4()
        self._store.scale_sets.set_disk(scale_set.id, instance.number, disk_id)
        image = self._store.get(str(scale_set.image_id))
        name = scale_set.instance_name(instance.number)
        new = NewDisk(
            name=name,
            place=image.path.with_name(f"{name}.{image.format.value}"),
            format=image.format,
            sku=image.sku,
            encryption_set=str(image.set_id) if image.set_id else None,
            id=disk_id,
            source=image,
        )
        return self._copies.copy([new]).disks[0]

    def _remove(self, connection: libvirt.virConnect, scale_set: ScaleSet, instance: Instance) -> None:
        """Remove domain and disk of an instance; caller has checked whether the domain may be destroyed."""
        domain = domains.find(connection, instance.domain_id)
        if domain is not None:
            with domains.gone_is_fine(or_ended=True):
                if domain.isActive():
                    domain.destroy()
            with domains.gone_is_fine():
                domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                )
        disk = self._disk(instance)
        if disk is not None:
            self._disks.delete(str(disk.id))
        self._store.scale_sets.forget(scale_set.id, instance.number)

    def _disk(self, instance: Instance) -> Disk | None:
        try:
            return self._store.get(str(instance.disk_id))
        except DiskNotFoundError:
            return None


def _beyond(scale_set: ScaleSet, size: int) -> list[str]:
    """The names of the planned instances with numbers above *size*, in the order of their removal."""
    return [
        scale_set.instance_name(each.number) for each in reversed(scale_set.instances) if each.number > size
    ]
