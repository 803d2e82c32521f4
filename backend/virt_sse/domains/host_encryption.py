"""Encryption at host when a domain starts: temporary disk, TPM DEK and checks for plaintext on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

import libvirt

from virt_sse.domains import temp_disks, tpm_envelope
from virt_sse.domains.data_on_host import HostData, LibvirtFiles, disk_data, has_tpm_state, survey
from virt_sse.errors import (
    DiskInUseError,
    InvalidValueError,
    KeyNotFoundError,
    PolicyError,
    VmStateError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secrets, set_secrets
from virt_sse.libvirt.vm_metadata import Stated
from virt_sse.model.disks import PLATFORM_KEY, Disk
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek
from virt_sse.model.layers import HostCaching
from virt_sse.model.operations import StartVm
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import NOWHERE, Vm, VmProperties, temp_disk_id, tpm_context
from virt_sse.plugins import PluginHost
from virt_sse.system.files import canonical
from virt_sse.system.locks import DiskLocks

_log = logging.getLogger(__name__)

_LOCK_TRIES, _LOCK_PAUSE = 20, 0.05


class HostEncryption:
    """Provides domains with the temporary disk and the DEK of the TPM, all or nothing."""

    def __init__(self, host: Host) -> None:
        self._config = host.config
        self._host = host
        self._reads = host.store_reads
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = DiskLocks(host.config.state_directory / "vms.lock")
        self.files = LibvirtFiles(host.config.root)

    @contextlib.contextmanager
    def prepared(self, definition: DomainDefinition) -> Iterator[None]:
        """Prepare the VM of a domain about to be started by libvirt; undo the preparation if the body fails.

        :raise VirtSseError: When the VM cannot be prepared, or must not start with this definition.
        """
        vm_id, name = definition.uuid, definition.name
        with contextlib.ExitStack() as undo:
            with self.locked(vm_id, name):
                metadata = definition.stated
                vm = self.finish_or_undo_update(self._reads.vms.find(vm_id), metadata)
                properties = agreed_properties(name, vm, metadata)
                disks = self.disks(definition)
                refuse_unencrypted(
                    self._plugins, name, properties, disks, has_temp_disk=bool(definition.temp_disks)
                )
                if metadata:
                    self._plugins.validate(StartVm(name, properties, disks))
                if properties.encryption_at_host:
                    found = survey(definition, self.files)
                    refuse_plaintext_data(found, name)
                    _warn(name, [each for each in found if each.is_avoidable])
                else:
                    found = list(disk_data(definition.guest_data))
                    _warn(name, [each for each in found if each.is_of_encrypted_disk])
                self._refuse_foreign_tpm_secret(definition)
                if metadata or definition.has_our_tpm_secret:
                    with connected(self._config.libvirt_uri) as connection:
                        host_id = HostCapabilities.of(connection).host_id
                        vm = self._record_host(vm or new_vm(vm_id, metadata), name, host_id)
                        self._serve(connection, vm, definition, undo)
            yield
            undo.pop_all()

    def restore(self, definition: DomainDefinition) -> None:
        """Give libvirt the secrets of a running VM again.

        :raise VirtSseError: When a DEK cannot be unwrapped or a secret cannot be set.
        """
        wanted = definition.vm_secrets
        if not wanted:
            return
        vm_id, name = definition.uuid, definition.name
        deks = {}
        for secret in wanted:
            if secret.slot == TPM_SLOT:
                dek = self.tpm_dek(self._reads.vms.find(vm_id), name)
            else:
                dek = temp_disks.unlock(self._config, self._keys, vm_id, name)
            deks[secret] = dek
        with connected(self._config.libvirt_uri) as connection:
            set_secrets(connection, deks)

    @contextlib.contextmanager
    def locked(self, vm_id: UUID, name: str) -> Iterator[None]:
        """Lock the VM against other commands.

        :raise VmStateError: When a different command still holds the lock after one second. Longer waits
            might deadlock: the command may wait for libvirt, and libvirt for the hook running this code.
        """
        with contextlib.ExitStack() as held:
            for left in reversed(range(_LOCK_TRIES)):
                try:
                    held.enter_context(self._locks.hold(vm_id))
                    break
                except DiskInUseError as exc:
                    if not left:
                        raise VmStateError(f"another command is at work on domain {name!r}") from exc
                    time.sleep(_LOCK_PAUSE)
            yield

    def finish_or_undo_update(self, vm: Vm | None, metadata: Stated | None) -> Vm | None:
        """Finish or undo an interrupted update of the VM, and return the VM.

        The update is finished if libvirt took the new definition, as *metadata* shows, and otherwise undone.
        """
        if vm is None or vm.pending is None:
            return vm
        number = vm.generation + 1
        if metadata and metadata.generation == number and metadata.properties == vm.pending.properties:
            return self._host.store.vms.commit(vm)
        undone = dataclasses.replace(vm, pending=None)
        self._host.store.vms.put(undone)
        return undone

    def disks(self, definition: DomainDefinition) -> tuple[Disk, ...]:
        """List the domain's disks of virt-sse. Disks unknown to the store are left out."""
        ids = {use.disk_id for use in definition.our_disks}
        return tuple(self._reads.with_ids(ids))

    def tpm_dek(self, vm: Vm | None, name: str) -> Dek:
        """Unwrap the DEK of a VM's TPM.

        :raise KeyNotFoundError: When the store has no DEK for the TPM.
        :raise KeyProviderError: When the DEK cannot be unwrapped.
        """
        if vm is None or vm.tpm is None:
            raise _lost(name)
        with audit_context(domain=name):
            return self._keys.unwrap(vm.tpm, context=tpm_context(vm.id))

    def with_tpm_dek(self, vm: Vm) -> Vm:
        """Add a DEK for the TPM to the VM, and store the wrapped DEK before any encryption with the DEK.

        If TPM state exists but the store has no DEK for the TPM, use the wrapped DEK stored beside the state.

        :raise KeyProviderError: When the DEK cannot be wrapped.
        :raise KeyNotFoundError: When state exists and the DEK of the state is lost.
        :raise EnvelopeError: When the wrapped DEK beside the state cannot be read.
        """
        if vm.tpm is not None:
            return vm
        wrapped = None
        if has_tpm_state(vm.id, self.files):
            wrapped = tpm_envelope.read(self.files.tpm(vm.id), vm.id)
            if wrapped is None:
                raise _lost(vm.name)
        if wrapped is None:
            with audit_context(domain=vm.name):
                key = self._keys.current_key(PLATFORM_KEY)
                wrapped = self._keys.wrap(Dek.generate(), key, context=tpm_context(vm.id))
        vm = dataclasses.replace(vm, tpm=wrapped)
        self._host.store.vms.put(vm)
        return vm

    def carry_tpm_dek(self, vm: Vm) -> None:
        """Write the wrapped DEK of a VM's TPM beside the TPM's state.

        :raise EnvelopeError: When the wrapped DEK cannot be written.
        """
        if vm.tpm is not None:
            tpm_envelope.write(self.files.tpm(vm.id), vm.id, vm.tpm)

    def update_tpm_envelope(self, vm: Vm) -> None:
        """Write the wrapped DEK of a VM's TPM beside the TPM's state, if state exists.

        :raise EnvelopeError: When the wrapped DEK cannot be written.
        """
        if has_tpm_state(vm.id, self.files):
            self.carry_tpm_dek(vm)

    def _record_host(self, vm: Vm, name: str, host: UUID) -> Vm:
        """Record the VM's name and this host in the store."""
        located = dataclasses.replace(vm, name=name, host=host)
        if located != vm:
            self._host.store.vms.put(located)
        return located

    def _serve(
        self,
        connection: libvirt.virConnect,
        vm: Vm,
        definition: DomainDefinition,
        undo: contextlib.ExitStack,
    ) -> None:
        deks: dict[SecretName, Dek] = {}
        if definition.has_our_tpm_secret:
            vm = self.with_tpm_dek(vm)
            deks[SecretName(vm.id, TPM_SLOT)] = self.tpm_dek(vm, vm.name)
            self.carry_tpm_dek(vm)
        size = vm.properties.temp_disk_size
        uses = definition.temp_disks
        self._check_temp_disk(vm, uses)
        if size is not None and uses:
            qemu = definition.qemu_user or HostCapabilities.of(connection).qemu_user
            undo.callback(temp_disks.erase, self._config, vm.id)
            dek = temp_disks.create(
                self._config, self._plugins.host_layer(), self._keys, vm.id, vm.name, size, qemu
            )
            deks[SecretName(temp_disk_id(vm.id), TEMP_SLOT)] = dek
        set_secrets(connection, deks)
        if deks:
            undo.callback(drop_secrets, self._config.libvirt_uri, list(deks))

    def _refuse_foreign_tpm_secret(self, definition: DomainDefinition) -> None:
        """Refuse a copied definition with the TPM secret of the original VM; libvirt may hold this secret."""
        secret, name = definition.tpm_secret, definition.name
        if secret is None:
            return
        for other in self._host.store.vms.all():
            if other.id != definition.uuid and secret == SecretName(other.id, TPM_SLOT).uuid:
                raise InvalidValueError(
                    f"the TPM of domain {name!r} has the key of the TPM of domain {other.name!r}",
                    hint="remove <encryption> from the TPM's <backend>, with 'virsh edit'; "
                    f"'virt-sse vm update {name} --encryption-at-host on' adds a key for this TPM",
                )

    def _check_temp_disk(self, vm: Vm, uses: Sequence[DomainDisk]) -> None:
        wanted = vm.properties.temp_disk_size is not None
        hint = f"'virt-sse vm update {vm.name} --temp-disk-size SIZE|none' corrects the definition"
        if len(uses) != wanted:
            raise InvalidValueError(
                f"domain {vm.name!r} has {len(uses)} temporary disks instead of {wanted:d}", hint=hint
            )
        place = canonical(temp_disks.image(self._config, vm.id))
        for use in uses:
            if use.disk_id != temp_disk_id(vm.id):
                raise InvalidValueError(
                    f"{use.target} is the temporary disk of a different domain, not of {vm.name!r}", hint=hint
                )
            if use.source is None or canonical(use.source) != place:
                raise InvalidValueError(f"the temporary disk {use.target} is not at {place}", hint=hint)


def _lost(name: str) -> KeyNotFoundError:
    return KeyNotFoundError(
        f"the store does not have the key of the TPM of domain {name!r}",
        hint="restore the store from a backup; without the key, the secrets in the TPM are lost",
    )


def new_vm(vm_id: UUID, metadata: Stated | None) -> Vm:
    """Make a VM unknown to the store from the definition's metadata; not on any host yet."""
    if metadata is None:
        return Vm(vm_id, "", NOWHERE)
    return Vm(vm_id, "", NOWHERE, metadata.properties, metadata.generation)


def agreed_properties(name: str, vm: Vm | None, metadata: Stated | None) -> VmProperties:
    """Compare the VM's properties in definition and store, and return the properties.

    A store without the domain does not contradict the definition: the domain may have been moved here from
    a different host, or undefined and defined again.

    :raise PolicyError: When definition and store disagree. Either may be right, so the operator decides.
    """
    if vm is None:
        return metadata.properties if metadata else VmProperties()
    properties = metadata.properties if metadata else VmProperties()
    for field, (in_definition, in_store) in differences(properties, vm.properties).items():
        raise PolicyError(
            f"the definition of domain {name!r} says {field} is {in_definition}, the store says {in_store}",
            hint=f"'virt-sse vm update {name} --{field} {in_definition}' or '… {in_store}' "
            "resolves the conflict",
        )
    return properties


def differences(first: VmProperties, second: VmProperties) -> Mapping[str, tuple[str, str]]:
    """List the differing properties: option name on the command line → the two values as text."""
    pairs = {
        "encryption-at-host": (_switch(first.encryption_at_host), _switch(second.encryption_at_host)),
        "size": (first.size or "none", second.size or "none"),
        "temp-disk-size": (str(first.temp_disk_size or "none"), str(second.temp_disk_size or "none")),
    }
    return {field: values for field, values in pairs.items() if values[0] != values[1]}


def _switch(value: bool) -> str:
    return "on" if value else "off"


def refuse_unencrypted(
    plugins: PluginHost,
    name: str,
    properties: VmProperties,
    disks: tuple[Disk, ...],
    *,
    has_temp_disk: bool,
) -> None:
    """Refuse data at rest that needs encryption at host in a VM without encryption at host.

    :raise PolicyError: When the VM has a host cache, or a temporary disk that its size does not encrypt by
        itself according to the cloud profile.
    """
    if properties.encryption_at_host:
        return
    allows = f"'virt-sse vm update {name} --encryption-at-host on' allows this"
    for disk in disks:
        if disk.caching is not HostCaching.NONE:
            raise PolicyError(
                f"disk {disk.name!r} has host caching {disk.caching.value}, "
                f"but domain {name!r} has no encryption at host",
                hint=f"{allows}; '--disk-caching TARGET=None' removes the host cache",
            )
    has_temp_disk = has_temp_disk or properties.temp_disk_size is not None
    if has_temp_disk and not plugins.cloud_profile().encrypts_temp_disk(properties.size):
        raise PolicyError(
            f"domain {name!r} has a temporary disk, but no encryption at host",
            hint=f"{allows}; '--temp-disk-size none' removes the temporary disk",
        )


def refuse_plaintext_data(found: list[HostData], name: str) -> None:
    """Refuse a VM with encryption at host and plaintext data at rest caused by the configuration.

    :raise PolicyError: When *found* has such data.
    """
    for each in found:
        if each.is_refused:
            data = f"{each.name} at {each.place}" if each.place else each.name
            raise PolicyError(
                f"domain {name!r} has encryption at host, and its {data} is not encrypted: {each.reason}",
                hint=each.hint.replace("DOMAIN", name) if each.hint else None,
            )


def _warn(name: str, found: Sequence[HostData]) -> None:
    """Log plaintext data of a domain that starts nevertheless."""
    for each in found:
        where = f"{each.name} at {each.place}"
        _log.warning("domain %s: %s is not encrypted: %s", name, where, each.reason)
