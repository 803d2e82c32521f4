"""Serving VMs: what a domain is given at its start beside its disks, and what it is refused for."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

import libvirt

from virt_sse.domains import temp_disks, tpm_envelope
from virt_sse.domains.data_on_host import HostData, LibvirtFiles, has_tpm_state, survey
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
from virt_sse.system.files import canonical
from virt_sse.system.locks import DiskLocks

_LOCK_TRIES, _LOCK_PAUSE = 20, 0.05


class HostEncryption:
    """Provides domains with their temporary disk and the DEK of their TPM, all or nothing."""

    def __init__(self, host: Host) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = DiskLocks(host.config.state_directory / "vms.lock")
        self.files = LibvirtFiles(host.config.root)

    @contextlib.contextmanager
    def prepared(self, definition: DomainDefinition) -> Iterator[None]:
        """A domain that libvirt is about to start has all that its VM is to have; taken back if the rest
        fails.

        :raise VirtSseError: When it cannot, or must not start as it is.
        """
        vm_id, name = definition.uuid, definition.name
        with contextlib.ExitStack() as undo:
            with self.locked(vm_id, name):
                said = definition.stated
                vm = self.settled(self._store.vms.find(vm_id), said)
                properties = agreed(name, vm, said)
                disks = self.disks(definition)
                refuse_unencrypted(name, properties, disks, has_temp_disk=bool(definition.temp_disks))
                if said:
                    self._plugins.validate(StartVm(name, properties, disks))
                if properties.encryption_at_host:
                    refuse_at_rest(survey(definition, self.files), name)
                self._refuse_tpm_of_another(definition)
                if said or definition.has_our_tpm_secret:
                    with connected(self._config.libvirt_uri) as connection:
                        host_id = HostCapabilities.of(connection).host_id
                        vm = self._seen(vm or new(vm_id, said), name, host_id)
                        self._serve(connection, vm, definition, undo)
            yield
            undo.pop_all()

    def restore(self, definition: DomainDefinition) -> None:
        """Give libvirt the secrets of a running VM again.

        :raise VirtSseError: When one cannot be had.
        """
        wanted = definition.vm_secrets
        if not wanted:
            return
        vm_id, name = definition.uuid, definition.name
        deks = {}
        for secret in wanted:
            if secret.slot == TPM_SLOT:
                dek = self.tpm_dek(self._store.vms.find(vm_id), name)
            else:
                dek = temp_disks.unlock(self._config, self._keys, vm_id, name)
            deks[secret] = dek
        with connected(self._config.libvirt_uri) as connection:
            set_secrets(connection, deks)

    @contextlib.contextmanager
    def locked(self, vm_id: UUID, name: str) -> Iterator[None]:
        """Keep every other command away from the VM.

        :raise VmStateError: When another is at work on it, and stays so. It may be waiting for libvirt, and
            libvirt for the hook that this runs in: it is not waited for.
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

    def settled(self, vm: Vm | None, said: Stated | None) -> Vm | None:
        """The VM once an update that was cut off is finished, or undone, by what the definition says."""
        if vm is None or vm.pending is None:
            return vm
        if said and said.generation == vm.generation + 1 and said.properties == vm.pending.properties:
            return self._store.vms.commit(vm)
        undone = dataclasses.replace(vm, pending=None)
        self._store.vms.put(undone)
        return undone

    def disks(self, definition: DomainDefinition) -> tuple[Disk, ...]:
        """The disks of ours that the domain has, if the store knows the disks."""
        ids = {use.disk_id for use in definition.our_disks}
        return tuple(self._store.with_ids(ids))

    def tpm_dek(self, vm: Vm | None, name: str) -> Dek:
        """The DEK of a VM's TPM.

        :raise KeyNotFoundError: When the store has none.
        :raise KeyProviderError: When it cannot be unwrapped.
        """
        if vm is None or vm.tpm is None:
            raise _lost(name)
        with audit_context(domain=name):
            return self._keys.unwrap(vm.tpm, context=tpm_context(vm.id))

    def with_tpm_dek(self, vm: Vm) -> Vm:
        """The VM with a DEK for its TPM, in the store before anything is encrypted with it.

        For state that there is, one that the store has lost is that which lies beside it.

        :raise KeyProviderError: When it cannot be wrapped.
        :raise KeyNotFoundError: When there is state, and its DEK is lost.
        :raise EnvelopeError: When what lies beside the state cannot be read.
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
        self._store.vms.put(vm)
        return vm

    def carry_tpm_dek(self, vm: Vm) -> None:
        """Let the state of a VM's TPM carry its wrapped DEK.

        :raise EnvelopeError: When it cannot be written.
        """
        if vm.tpm is not None:
            tpm_envelope.write(self.files.tpm(vm.id), vm.id, vm.tpm)

    def update_tpm_envelope(self, vm: Vm) -> None:
        """Write the wrapped DEK of a VM's TPM beside the TPM's state, if state exists.

        :raise EnvelopeError: When the wrapped DEK cannot be written.
        """
        if has_tpm_state(vm.id, self.files):
            self.carry_tpm_dek(vm)

    def _seen(self, vm: Vm, name: str, host: UUID) -> Vm:
        """The VM, noted to be here."""
        seen = dataclasses.replace(vm, name=name, host=host)
        if seen != vm:
            self._store.vms.put(seen)
        return seen

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

    def _refuse_tpm_of_another(self, definition: DomainDefinition) -> None:
        """Refuse a copied definition with the TPM secret of the original VM; that secret may be set."""
        secret, name = definition.tpm_secret, definition.name
        if secret is None:
            return
        for other in self._store.vms.all():
            if other.id != definition.uuid and secret == SecretName(other.id, TPM_SLOT).uuid:
                raise InvalidValueError(
                    f"the TPM of domain {name!r} has the key of that of domain {other.name!r}",
                    hint="take <encryption> out of its <backend>, with 'virsh edit'; "
                    f"'virt-sse vm update {name} --encryption-at-host on' puts its own there",
                )

    def _check_temp_disk(self, vm: Vm, uses: Sequence[DomainDisk]) -> None:
        wanted = vm.properties.temp_disk_size is not None
        hint = f"'virt-sse vm update {vm.name} --temp-disk-size SIZE|none' brings its definition in order"
        if len(uses) != wanted:
            raise InvalidValueError(
                f"domain {vm.name!r} has {len(uses)} temporary disks instead of {wanted:d}", hint=hint
            )
        place = canonical(temp_disks.image(self._config, vm.id))
        for use in uses:
            if use.disk_id != temp_disk_id(vm.id):
                raise InvalidValueError(
                    f"{use.target} is the temporary disk of another domain than {vm.name!r}", hint=hint
                )
            if use.source is None or canonical(use.source) != place:
                raise InvalidValueError(f"the temporary disk {use.target} is not at {place}", hint=hint)


def _lost(name: str) -> KeyNotFoundError:
    return KeyNotFoundError(
        f"the store does not have the key of the TPM of domain {name!r}",
        hint="restore the store from a backup; without it what the TPM holds is lost",
    )


def new(vm_id: UUID, said: Stated | None) -> Vm:
    """A VM that the store does not know, as its definition says; not on any host yet."""
    if said is None:
        return Vm(vm_id, "", NOWHERE)
    return Vm(vm_id, "", NOWHERE, said.properties, said.generation)


def agreed(name: str, vm: Vm | None, said: Stated | None) -> VmProperties:
    """What a VM is to have, by its definition and the store.

    A store that does not know the domain does not contradict its definition: it may have come from another
    host, or have been undefined and defined again.

    :raise PolicyError: When they disagree: nobody knows which of them is right.
    """
    if vm is None:
        return said.properties if said else VmProperties()
    here = said.properties if said else VmProperties()
    for field, (in_definition, in_store) in differences(here, vm.properties).items():
        raise PolicyError(
            f"the definition of domain {name!r} says {field} is {in_definition}, the store says {in_store}",
            hint=f"'virt-sse vm update {name} --{field} {in_definition}' or '… {in_store}' settles it",
        )
    return here


def differences(one: VmProperties, other: VmProperties) -> Mapping[str, tuple[str, str]]:
    """In what they differ, by the name of the command line's option, and what either says in its words."""
    pairs = {
        "encryption-at-host": (_switch(one.encryption_at_host), _switch(other.encryption_at_host)),
        "size": (one.size or "none", other.size or "none"),
        "temp-disk-size": (str(one.temp_disk_size or "none"), str(other.temp_disk_size or "none")),
    }
    return {field: values for field, values in pairs.items() if values[0] != values[1]}


def _switch(value: bool) -> str:
    return "on" if value else "off"


def refuse_unencrypted(
    name: str, properties: VmProperties, disks: tuple[Disk, ...], *, has_temp_disk: bool
) -> None:
    """Refuse a VM without encryption at host what only that keeps from lying on the host in the clear.

    :raise PolicyError: When it has a host cache or a temporary disk.
    """
    if properties.encryption_at_host:
        return
    allows = f"'virt-sse vm update {name} --encryption-at-host on' allows it"
    for disk in disks:
        if disk.caching is not HostCaching.NONE:
            raise PolicyError(
                f"disk {disk.name!r} has host caching {disk.caching.value}, "
                f"and domain {name!r} no encryption at host",
                hint=f"{allows}, '--disk-caching TARGET=None' does without",
            )
    if has_temp_disk or properties.temp_disk_size is not None:
        raise PolicyError(
            f"domain {name!r} has a temporary disk, and no encryption at host",
            hint=f"{allows}, '--temp-disk-size none' does without",
        )


def refuse_at_rest(found: list[HostData], name: str) -> None:
    """Refuse a VM with encryption at host what would lie on the host in the clear because it is configured
    so.

    :raise PolicyError: When there is something of the kind.
    """
    for each in found:
        if each.is_refused:
            data = f"{each.name} at {each.place}" if each.place else each.name
            raise PolicyError(
                f"domain {name!r} has encryption at host, and its {data} is not encrypted: {each.reason}",
                hint=each.hint.replace("DOMAIN", name) if each.hint else None,
            )
