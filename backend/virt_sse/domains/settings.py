"""Virtual machines: what domains are asked to be beside what their disks are.

The order of an update's writes is the point. What is to be is noted first, as pending; then libvirt takes the
new definition, in one piece, with the number of the update in it; then what was pending is. Whatever comes
next, an update or a start, sees by that number whether one that was cut off came to pass, and finishes or
undoes it.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from uuid import UUID

import libvirt

from virt_sse.disks.inspector import Inspector
from virt_sse.domains import temp_disks
from virt_sse.domains.data_on_host import HostData, has_tpm_state, memory_snapshot, survey
from virt_sse.domains.host_encryption import (
    HostEncryption,
    agreed,
    differences,
    new,
    refuse_at_rest,
    refuse_unencrypted,
)
from virt_sse.domains.start import DomainStart
from virt_sse.errors import InvalidValueError, PolicyError, VirtSseError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.libvirt.snapshots import SnapshotFiles
from virt_sse.libvirt.vm_metadata import Stated
from virt_sse.model.content import Content, Finding
from virt_sse.model.disks import Disk
from virt_sse.model.keys import KeyId
from virt_sse.model.layers import HostCaching
from virt_sse.model.operations import UpdateVm
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties, check_size_name


class Keep(enum.Enum):
    """For a property that an update leaves as it is."""

    KEEP = enum.auto()


KEEP = Keep.KEEP


@dataclass(frozen=True, slots=True)
class VmChanges:
    """What an update is to change.

    :ivar caching: by a disk's name in the guest, what the host is to cache of it.
    """

    encryption_at_host: bool | Keep = KEEP
    size: str | Keep | None = KEEP
    temp_disk_size: int | Keep | None = KEEP
    caching: Mapping[str, HostCaching] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VmView:
    """A domain as it is.

    :ivar properties: what its definition says.
    :ivar problem: why it would not start as it is, as far as that is known without trying.
    :ivar disks: of ours, by their names in the guest.
    :ivar tpm_key: the KEK that the DEK of its TPM is under, if that is of ours.
    """

    id: UUID
    name: str
    is_active: bool
    properties: VmProperties
    problem: VirtSseError | None
    disks: Mapping[str, Disk]
    tpm_key: KeyId | None
    at_rest: tuple[HostData, ...] = ()


class VmSettings:
    """The settings of all domains of this host's libvirt: shown and updated."""

    def __init__(
        self, host: Host, start: DomainStart, host_encryption: HostEncryption, inspector: Inspector
    ) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._start = start
        self._host_encryption = host_encryption
        self._inspector = inspector

    def all(self) -> list[VmView]:
        """All domains, by name, without what of them is at rest.

        :raise LibvirtUnavailableError: When libvirt cannot be asked.
        """
        views = []
        with connected(self._config.libvirt_uri) as connection:
            listed = connection.listAllDomains()
            self._tidy(connection, listed)
            for domain in listed:
                with domains.gone_is_fine():
                    views.append(self._view(domain, with_rest=False))
        return sorted(views, key=lambda view: view.name)

    def show(self, name: str) -> VmView:
        """One domain, with all of it that is at rest on this host.

        :raise LibvirtError: When there is no such domain.
        """
        with connected(self._config.libvirt_uri) as connection:
            self._tidy(connection, connection.listAllDomains())
            return self._view(domains.lookup(connection, name), with_rest=True)

    def update(self, name: str, changes: VmChanges) -> VmView:
        """Change what a domain is to be, from its next start on.

        :raise VmStateError: When it runs, has a saved state, or has no definition.
        :raise PolicyError: When a rule refuses it, or something of it would lie on the host in plaintext; or
            when its definition and the store disagree in what is not to be changed.
        :raise InvalidValueError: When it makes no sense.
        :raise LibvirtError: When there is no such domain, or libvirt refuses its new definition.
        """
        with connected(self._config.libvirt_uri) as connection:
            domain = domains.lookup(connection, name)
            _refuse_if_it_runs(domain)
            vm_id = UUID(bytes=domain.UUID())
            with self._host_encryption.locked(vm_id, name):
                _refuse_if_it_runs(domain)
                self._update(domain, vm_id, changes, HostCapabilities.of(connection).host_id)
            return self._view(domain, with_rest=True)

    def _update(self, domain: libvirt.virDomain, vm_id: UUID, changes: VmChanges, host: UUID) -> None:
        name = domain.name()
        before_update = domains.definition(domain, inactive=True, secure=True)
        said = before_update.stated
        known = self._host_encryption.settled(self._store.vms.find(vm_id), said)
        before = _before(name, known, said, changes)
        after = _after(before, changes)
        disks, caching = self._with_caching(before_update, changes.caching)
        content = Content(lambda: self._in_guest_encryption(name))
        self._plugins.validate(UpdateVm(name, before, after, tuple(disks.values()), content))
        refuse_unencrypted(name, after, tuple(disks.values()), has_temp_disk=False)

        vm = known or new(vm_id, said)
        generation = max(vm.generation, said.generation if said else 0)
        edit = self._edited(before_update, Stated(after, generation + 1))
        if after.encryption_at_host:
            refuse_at_rest(survey(edit.result(), self._host_encryption.files), name)
        edit.set_sources({disk.id: self._start.source(disk) for disk in disks.values() if disk.id in caching})
        definition = edit.result()

        vm = dataclasses.replace(vm, name=name, host=host, generation=generation)
        if definition.has_our_tpm_secret:
            vm = self._host_encryption.with_tpm_dek(vm)
        vm = dataclasses.replace(vm, pending=PendingUpdate(after, caching))
        self._store.vms.put(vm)
        try:
            domain.connect().defineXML(definition.to_xml())
        except libvirt.libvirtError:
            self._store.vms.put(dataclasses.replace(vm, pending=None))
            raise
        vm = self._store.vms.commit(vm)
        if vm.tpm and not definition.has_our_tpm_secret and not self._has_tpm_state(vm_id):
            self._store.vms.put(dataclasses.replace(vm, tpm=None))

    def _edited(self, definition: DomainDefinition, stated: Stated) -> DomainEdit:
        """An edit of *definition* that gives the VM the properties in *stated*."""
        vm_id, properties = definition.uuid, stated.properties
        edit = DomainEdit(definition)
        edit.state(stated)
        has_temp_disk = properties.temp_disk_size is not None
        edit.set_temp_disk(temp_disks.image(self._config, vm_id) if has_temp_disk else None)
        if properties.encryption_at_host:
            edit.exclude_memory_from_core_dumps()
            if definition.tpm_secret is None:
                edit.set_tpm_encryption(encrypted=True)
        elif definition.has_our_tpm_secret and not self._has_tpm_state(vm_id):
            # Existing state keeps its encryption and its key: swtpm cannot decrypt state permanently.
            edit.set_tpm_encryption(encrypted=False)
        return edit

    def _has_tpm_state(self, vm_id: UUID) -> bool:
        return has_tpm_state(vm_id, self._host_encryption.files)

    def _with_caching(
        self, definition: DomainDefinition, wanted: Mapping[str, HostCaching]
    ) -> tuple[dict[str, Disk], dict[UUID, HostCaching]]:
        """The disks of ours that the domain is to have, by their names in the guest, and what of them
        changes.
        """
        disks = self._by_target(definition)
        caching = {}
        for target, mode in wanted.items():
            if target not in disks:
                known = ", ".join(sorted(disks)) or "none"
                raise InvalidValueError(
                    f"{target[:20]!r} is no disk of virt-sse in the domain", hint=f"there are: {known}"
                )
            disks[target] = dataclasses.replace(disks[target], caching=mode)
            caching[disks[target].id] = mode
        return disks, caching

    def _by_target(self, definition: DomainDefinition) -> dict[str, Disk]:
        by_id = {disk.id: disk for disk in self._host_encryption.disks(definition)}
        return {use.target: by_id[use.disk_id] for use in definition.our_disks if use.disk_id in by_id}

    def _in_guest_encryption(self, name: str) -> list[Finding]:
        return [finding for each in self._inspector.in_use(name) for finding in each.findings]

    def _view(self, domain: libvirt.virDomain, *, with_rest: bool) -> VmView:
        vm_id, name, is_active = UUID(bytes=domain.UUID()), domain.name(), bool(domain.isActive())
        definition = domains.definition(domain, inactive=not is_active)
        vm = self._store.vms.find(vm_id)
        problem: VirtSseError | None = None
        properties = VmProperties()
        disks: dict[str, Disk] = {}
        rest: list[HostData] = []
        try:
            rest = self._at_rest(domain, definition) if with_rest else []
            disks = self._by_target(definition)
            said = definition.stated
            properties = said.properties if said else VmProperties()
            if vm is None or vm.pending is None:  # what was cut off, the next start or update puts in order
                agreed(name, vm, said)
            temp = bool(definition.temp_disks)
            refuse_unencrypted(name, properties, tuple(disks.values()), has_temp_disk=temp)
            if properties.encryption_at_host and not is_active:
                refuse_at_rest(rest, name)
        except (PolicyError, InvalidValueError) as exc:
            problem = exc
        tpm_key = vm.tpm.key if vm and vm.tpm else None
        return VmView(vm_id, name, is_active, properties, problem, disks, tpm_key, tuple(rest))

    def _at_rest(self, domain: libvirt.virDomain, definition: DomainDefinition) -> list[HostData]:
        snapshots = [SnapshotFiles.parse(each.getXMLDesc()) for each in domain.listAllSnapshots()]
        memory = [found for snapshot in snapshots if (found := memory_snapshot(snapshot))]
        return [*survey(definition, self._host_encryption.files), *memory]

    def _tidy(self, connection: libvirt.virConnect, listed: Collection[libvirt.virDomain]) -> None:
        """Erase temporary disks that no domain uses, and forget the VMs of this host whose domain is gone.

        Not one with a TPM whose state is still there: its key is in the store alone.
        """
        before = time.time() - temp_disks.SETTLED_SECONDS
        running = set()
        present = set()
        for domain in listed:
            with domains.gone_is_fine():
                present.add(vm_id := UUID(bytes=domain.UUID()))
                if domain.isActive():
                    running.add(vm_id)
        temp_disks.erase_unused(self._config, running, before=before)
        stale = [vm for vm in self._store.vms.all() if vm.id not in present]
        if not stale:
            return
        here = HostCapabilities.of(connection).host_id
        for vm in stale:
            if vm.host == here and not (vm.tpm and self._has_tpm_state(vm.id)):
                self._store.vms.remove(vm.id)


def _before(name: str, vm: Vm | None, said: Stated | None, changes: VmChanges) -> VmProperties:
    """What the VM is now. Where definition and store disagree, what the update says is what settles it."""
    if vm is None:
        return said.properties if said else VmProperties()
    here = said.properties if said else VmProperties()
    given = {
        "encryption-at-host": changes.encryption_at_host is not KEEP,
        "size": changes.size is not KEEP,
        "temp-disk-size": changes.temp_disk_size is not KEEP,
    }
    if any(not given[field] for field in differences(here, vm.properties)):
        agreed(name, vm, said)
    return vm.properties


def _after(before: VmProperties, changes: VmChanges) -> VmProperties:
    at_host, size, temp_size = changes.encryption_at_host, changes.size, changes.temp_disk_size
    return VmProperties(
        before.encryption_at_host if isinstance(at_host, Keep) else at_host,
        before.size if isinstance(size, Keep) else size and check_size_name(size),
        before.temp_disk_size if isinstance(temp_size, Keep) else temp_size,
    )


def _refuse_if_it_runs(domain: libvirt.virDomain) -> None:
    name = domain.name()
    if not domain.isPersistent():
        raise VmStateError(
            f"domain {name!r} has no definition that could be changed: it is transient",
            hint="'virsh define' gives it one",
        )
    if domain.isActive():
        raise VmStateError(
            f"domain {name!r} runs",
            hint=f"stop it, e.g. by 'virsh shutdown {name}', and start it again afterwards",
        )
    if domain.hasManagedSaveImage():
        raise VmStateError(
            f"domain {name!r} has a saved state, from which it would go on as it was",
            hint=f"start it and shut it down, or discard the state with 'virsh managedsave-remove {name}'",
        )
