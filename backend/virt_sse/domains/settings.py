"""Settings of virtual machines: encryption at host, size, temporary disk and host caching.

The order of an update's writes makes updates atomic:

1. The store records the new settings as pending.
2. libvirt takes the new definition, in a single define, with the update's number in the metadata.
3. The store makes the pending settings current.

The next update or start compares the number with the store, and so finishes or undoes an interrupted update.
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
from virt_sse.domains.data_on_host import HostData, has_tpm_state, memory_snapshot, saved_state, survey
from virt_sse.domains.guest_preload import is_accelerated
from virt_sse.domains.host_encryption import (
    HostEncryption,
    agreed_properties,
    differences,
    new_vm,
    refuse_plaintext_data,
    refuse_unencrypted,
)
from virt_sse.domains.saved_states import SavedStates
from virt_sse.domains.start import DomainStart
from virt_sse.errors import InvalidValueError, PolicyError, VirtSseError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DiskSource
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
from virt_sse.system import acceleration
from virt_sse.system.guest_library import LibraryInUse
from virt_sse.system.running_process import qemu_process


class Keep(enum.Enum):
    """Marks a property left unchanged by an update."""

    KEEP = enum.auto()


KEEP = Keep.KEEP


@dataclass(frozen=True, slots=True)
class VmChanges:
    """Changes by an update.

    :ivar caching: new host caching by the disk's name in the guest.
    :ivar refresh_disks: whether to change the sources of disks with another placement than the definition's.
        A change of placement needs this once.
    :ivar accelerate: whether the domain's QEMU preloads the XTS library.
    """

    encryption_at_host: bool | Keep = KEEP
    size: str | Keep | None = KEEP
    temp_disk_size: int | Keep | None = KEEP
    caching: Mapping[str, HostCaching] = field(default_factory=dict)
    refresh_disks: bool = False
    accelerate: bool | Keep = KEEP


@dataclass(frozen=True, slots=True)
class VmView:
    """Present settings of a domain.

    :ivar properties: by the definition.
    :ivar problem: a reason for the domain not to start, found without trying.
    :ivar disks: virt-sse's disks by the name in the guest.
    :ivar tpm_key: the KEK over the DEK of the TPM, if virt-sse encrypts the TPM's state.
    :ivar is_accelerated: whether the definition asks for the XTS library in the domain's QEMU.
    :ivar library: the XTS library in the running QEMU; ``None`` if the process is not visible, and in the
        list of all domains.
    :ivar at_rest: data of the guest at host_data on this host; empty in the list of all domains.
    """

    id: UUID
    name: str
    is_active: bool
    properties: VmProperties
    problem: VirtSseError | None
    disks: Mapping[str, Disk]
    tpm_key: KeyId | None
    is_accelerated: bool
    library: LibraryInUse | None
    at_rest: tuple[HostData, ...] = ()


class VmSettings:
    """Shows and updates the settings of the domains of this host's libvirt."""

    def __init__(
        self,
        host: Host,
        start: DomainStart,
        host_encryption: HostEncryption,
        inspector: Inspector,
        saved_states: SavedStates,
    ) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._start = start
        self._host_encryption = host_encryption
        self._inspector = inspector
        self._saved_states = saved_states

    def all(self) -> list[VmView]:
        """List all domains by name, without data at rest.

        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        views = []
        with connected(self._config.libvirt_uri) as connection:
            listed = connection.listAllDomains()
            self._tidy(connection, listed)
            for domain in listed:
                with domains.gone_is_fine():
                    views.append(self._view(domain, with_host_data=False))
        return sorted(views, key=lambda view: view.name)

    def show(self, name: str) -> VmView:
        """Show a domain, with all data at host_data on this host.

        :raise LibvirtError: When the domain does not exist.
        """
        with connected(self._config.libvirt_uri) as connection:
            self._tidy(connection, connection.listAllDomains())
            return self._view(domains.lookup(connection, name), with_host_data=True)

    def update(self, name: str, changes: VmChanges) -> VmView:
        """Change the settings of a domain, effective from the next start.

        :raise VmStateError: When the domain runs, has a saved state, or is transient.
        :raise PolicyError: When a rule refuses the update; when data would lie on the host in plaintext; or
            when definition and store disagree about a property not changed by the update.
        :raise InvalidValueError: When a change is invalid.
        :raise LibvirtError: When the domain does not exist, or libvirt refuses the new definition.
        """
        with connected(self._config.libvirt_uri) as connection:
            domain = domains.lookup(connection, name)
            _refuse_unless_updatable(domain)
            vm_id = UUID(bytes=domain.UUID())
            if path := self._saved_states.of_domain(vm_id):
                raise VmStateError(
                    f"domain {name!r} has a saved state in {path}, which would resume with the old settings",
                    hint=f"'virt-sse vm restore {path}' and shut the guest down, or remove the file",
                )
            with self._host_encryption.locked(vm_id, name):
                _refuse_unless_updatable(domain)
                self._update(domain, vm_id, changes, HostCapabilities.of(connection).host_id)
            return self._view(domain, with_host_data=True)

    def _update(self, domain: libvirt.virDomain, vm_id: UUID, changes: VmChanges, host: UUID) -> None:
        name = domain.name()
        before_update = domains.definition(domain, inactive=True, secure=True)
        metadata = before_update.stated
        known = self._host_encryption.finish_or_undo_update(self._store.vms.find(vm_id), metadata)
        before = _before(name, known, metadata, changes)
        after = _after(before, changes)
        disks, caching = self._with_caching(before_update, changes.caching)
        content = Content(lambda: self._in_guest_encryption(name))
        self._plugins.validate(UpdateVm(name, before, after, tuple(disks.values()), content))
        refuse_unencrypted(self._plugins, name, after, tuple(disks.values()), has_temp_disk=False)

        vm = known or new_vm(vm_id, metadata)
        generation = max(vm.generation, metadata.generation if metadata else 0)
        edit = self._edited(before_update, Stated(after, generation + 1))
        if after.encryption_at_host:
            refuse_plaintext_data(survey(edit.result(), self._host_encryption.files), name)
        sources = {disk.id: self._start.source(disk) for disk in disks.values()}
        changed = set(caching)
        if changes.refresh_disks:
            changed |= _moved(before_update, sources)
        edit.set_sources({disk_id: source for disk_id, source in sources.items() if disk_id in changed})
        edit.state_no_backing(sources)
        if not isinstance(changes.accelerate, Keep):
            self._accelerate(edit, accelerate=changes.accelerate)
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

    def _edited(self, definition: DomainDefinition, metadata: Stated) -> DomainEdit:
        """Make an edit of *definition* for the properties in *metadata*."""
        vm_id, properties = definition.uuid, metadata.properties
        edit = DomainEdit(definition)
        edit.state(metadata)
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

    def _accelerate(self, edit: DomainEdit, *, accelerate: bool) -> None:
        library = self._config.guest_library
        if accelerate and (reason := library.obstacle()):
            raise PolicyError(
                f"the library for guests cannot be used: {reason}",
                hint="'virt-sse host init --accelerate' installs the library",
            )
        edit.set_preload(library.path, acceleration.ALLOCATOR, preloaded=accelerate)

    def _has_tpm_state(self, vm_id: UUID) -> bool:
        return has_tpm_state(vm_id, self._host_encryption.files)

    def _with_caching(
        self, definition: DomainDefinition, wanted: Mapping[str, HostCaching]
    ) -> tuple[dict[str, Disk], dict[UUID, HostCaching]]:
        """Apply the wanted host caching to the domain's disks.

        :return: the disks by the name in the guest, and the changed caching by disk id.
        """
        disks = self._by_target(definition)
        caching = {}
        for target, mode in wanted.items():
            if target not in disks:
                known = ", ".join(sorted(disks)) or "none"
                raise InvalidValueError(
                    f"{target[:20]!r} is no disk of virt-sse in the domain",
                    hint=f"disks of virt-sse: {known}",
                )
            disks[target] = dataclasses.replace(disks[target], caching=mode)
            caching[disks[target].id] = mode
        return disks, caching

    def _by_target(self, definition: DomainDefinition) -> dict[str, Disk]:
        by_id = {disk.id: disk for disk in self._host_encryption.disks(definition)}
        return {use.target: by_id[use.disk_id] for use in definition.our_disks if use.disk_id in by_id}

    def _in_guest_encryption(self, name: str) -> list[Finding]:
        return [finding for each in self._inspector.in_use(name) for finding in each.findings]

    def _view(self, domain: libvirt.virDomain, *, with_host_data: bool) -> VmView:
        vm_id, name, is_active = UUID(bytes=domain.UUID()), domain.name(), bool(domain.isActive())
        definition = domains.definition(domain, inactive=not is_active)
        vm = self._store.vms.find(vm_id)
        problem: VirtSseError | None = None
        properties = VmProperties()
        disks: dict[str, Disk] = {}
        host_data: list[HostData] = []
        try:
            host_data = self._host_data(domain, definition) if with_host_data else []
            disks = self._by_target(definition)
            metadata = definition.stated
            properties = metadata.properties if metadata else VmProperties()
            if vm is None or vm.pending is None:  # the next start or update resolves an interrupted update
                agreed_properties(name, vm, metadata)
            temp = bool(definition.temp_disks)
            refuse_unencrypted(self._plugins, name, properties, tuple(disks.values()), has_temp_disk=temp)
            if properties.encryption_at_host and not is_active:
                refuse_plaintext_data(host_data, name)
        except (PolicyError, InvalidValueError) as exc:
            problem = exc
        library = self._config.guest_library
        is_wanted = is_active and with_host_data
        pid = qemu_process(self._config.qemu_pid_file(name), vm_id) if is_wanted else None
        return VmView(
            id=vm_id,
            name=name,
            is_active=is_active,
            properties=properties,
            problem=problem,
            disks=disks,
            tpm_key=vm.tpm.key if vm and vm.tpm else None,
            is_accelerated=is_accelerated(library, definition),
            library=library.in_use(pid) if pid else None,
            at_rest=tuple(host_data),
        )

    def _host_data(self, domain: libvirt.virDomain, definition: DomainDefinition) -> list[HostData]:
        snapshots = [SnapshotFiles.parse(each.getXMLDesc()) for each in domain.listAllSnapshots()]
        memory = [found for snapshot in snapshots if (found := memory_snapshot(snapshot))]
        if path := self._saved_states.of_domain(definition.uuid):
            memory.append(saved_state(path))
        return [*survey(definition, self._host_encryption.files), *memory]

    def _tidy(self, connection: libvirt.virConnect, listed: Collection[libvirt.virDomain]) -> None:
        """Erase unused temporary disks, and remove this host's VMs without a domain from the store.

        A VM with existing TPM state stays: the store may hold the only copy of the key.
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


def _moved(definition: DomainDefinition, sources: Mapping[UUID, DiskSource]) -> set[UUID]:
    """The disks, without overlays, whose placement differs between definition and *sources*."""
    found = set()
    for chain in definition.disk_chains():
        source = sources.get(chain.disk_id) if chain.disk_id and chain.ours == 0 else None
        if source and (chain.links[0].slot is None) != (source.slot is None):
            found.add(source.disk_id)
    return found


def _before(name: str, vm: Vm | None, metadata: Stated | None, changes: VmChanges) -> VmProperties:
    """Return the VM's present properties.

    The update's own values resolve a conflict between definition and store.

    :raise PolicyError: When definition and store disagree about a property not changed by the update.
    """
    if vm is None:
        return metadata.properties if metadata else VmProperties()
    in_definition = metadata.properties if metadata else VmProperties()
    given = {
        "encryption-at-host": changes.encryption_at_host is not KEEP,
        "size": changes.size is not KEEP,
        "temp-disk-size": changes.temp_disk_size is not KEEP,
    }
    if any(not given[field] for field in differences(in_definition, vm.properties)):
        agreed_properties(name, vm, metadata)
    return vm.properties


def _after(before: VmProperties, changes: VmChanges) -> VmProperties:
    at_host, size, temp_size = changes.encryption_at_host, changes.size, changes.temp_disk_size
    return VmProperties(
        before.encryption_at_host if isinstance(at_host, Keep) else at_host,
        before.size if isinstance(size, Keep) else size and check_size_name(size),
        before.temp_disk_size if isinstance(temp_size, Keep) else temp_size,
    )


def _refuse_unless_updatable(domain: libvirt.virDomain) -> None:
    name = domain.name()
    if not domain.isPersistent():
        raise VmStateError(
            f"domain {name!r} is transient: there is no persistent definition to change",
            hint="'virsh define' makes the domain persistent",
        )
    if domain.isActive():
        raise VmStateError(
            f"domain {name!r} runs",
            hint=f"stop the domain, e.g. with 'virsh shutdown {name}', and start the domain again afterwards",
        )
    if domain.hasManagedSaveImage():
        raise VmStateError(
            f"domain {name!r} has a saved state, which would resume with the old settings",
            hint="start the domain and shut the guest down, or discard the state with "
            f"'virsh managedsave-remove {name}'",
        )
