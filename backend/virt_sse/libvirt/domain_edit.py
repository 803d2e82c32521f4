"""Changes to a domain definition, as ``virt-sse vm update`` makes them (libvirt formatdomain)."""

from __future__ import annotations

import copy
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt import qemu_environment
from virt_sse.libvirt.disk_element import (
    DiskSource,
    add_backing_store,
    disk_element,
    free_target,
    set_source,
    target_of,
    uses_of,
)
from virt_sse.libvirt.domain_definition import DomainDefinition, emulated_tpm
from virt_sse.libvirt.migration_token import MIGRATION_NAMESPACE, MIGRATION_PREFIX, write_token
from virt_sse.libvirt.qemu_environment import QEMU_NAMESPACE, QEMU_PREFIX
from virt_sse.libvirt.secret_name import PREFIX, SecretName
from virt_sse.libvirt.vm_metadata import VM_NAMESPACE, VM_PREFIX, Stated, write_metadata
from virt_sse.libvirt.xml import parse_xml, to_text
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import temp_disk_id


class DomainEdit:
    """An editable copy of a domain definition; the original stays unchanged."""

    def __init__(self, definition: DomainDefinition) -> None:
        self._original = definition
        self._vm_id = definition.uuid
        self._root, prefixes = definition.copy_tree()
        self._before = ET.tostring(self._root)
        # Last, because the last prefix of a URI wins, and the agent searches the text for this prefix.
        self._prefixes = {QEMU_PREFIX: QEMU_NAMESPACE, MIGRATION_PREFIX: MIGRATION_NAMESPACE}
        self._prefixes |= {prefix: uri for prefix, uri in prefixes.items() if prefix != VM_PREFIX}
        self._prefixes[VM_PREFIX] = VM_NAMESPACE

    def result(self) -> DomainDefinition:
        """The changed definition; the original itself if nothing has changed."""
        if ET.tostring(self._root) == self._before:
            return self._original
        root = copy.deepcopy(self._root)
        return DomainDefinition(to_text(root, self._prefixes), root, self._prefixes)

    def state(self, stated: Stated) -> None:
        """Set the properties of the VM in the metadata."""
        write_metadata(self._root, stated)

    def set_migration_token(self, token: UUID) -> None:
        """Set the token of a migration in the metadata."""
        write_token(self._root, token)

    def set_sources(self, sources: Mapping[UUID, DiskSource]) -> None:
        """Set the sources of the disks with these ids.

        :raise InvalidValueError: When a secret is malformed, or a disk has no driver or no source.
        """
        for disk in self._root.iterfind("./devices/disk"):
            for use in uses_of(disk):
                if use.disk_id in sources:
                    set_source(disk, sources[use.disk_id])
                    break

    def free_target(self, bus: DiskBus) -> str:
        """The first name on a bus without a disk; see :func:`~virt_sse.libvirt.disk_element.free_target`."""
        return free_target(self._root, bus)

    def add_disk(self, element: str) -> None:
        """Add a ``<disk>`` element after the domain's other disks.

        :raise InvalidValueError: When the domain has no devices, or another disk with this target.
        """
        devices, disk = self._root.find("devices"), parse_xml(element, kind="disk element")
        if devices is None:
            raise InvalidValueError("the domain has no devices")
        present = devices.findall("disk")
        if any(target_of(other) == target_of(disk) for other in present):
            raise InvalidValueError(f"the domain has a disk {target_of(disk)!r} already")
        devices.insert(list(devices).index(present[-1]) + 1 if present else 0, disk)

    def encrypt_disk(self, target: str, source: DiskSource) -> None:
        """Put an encrypted disk in the place of a plaintext disk; the guest's device stays the same.

        :param target: the disk's name in the guest.
        :raise InvalidValueError: When a disk has no driver or no source.
        """
        for disk in self._root.iterfind("./devices/disk"):
            if target_of(disk) == target:
                for below in disk.findall("backingStore"):
                    disk.remove(below)
                set_source(disk, source)
                disk.set("snapshot", "no")  # as in disk_element

    def state_no_backing(self, sources: Mapping[UUID, DiskSource]) -> None:
        """Add an empty ``<backingStore>`` to the disks with these ids, unless they have an overlay.

        :raise InvalidValueError: When a secret is malformed.
        """
        for disk in self._root.iterfind("./devices/disk"):
            for use in uses_of(disk):
                if use.disk_id in sources and use.source == sources[use.disk_id].place:
                    add_backing_store(disk)

    def set_temp_disk(self, path: Path | None) -> None:
        """Set the image of the VM's temporary disk; ``None`` removes the disk.

        An existing temporary disk keeps its position among the guest's devices.

        :raise InvalidValueError: When the definition has no devices, or no free target for a disk.
        """
        disk_id = temp_disk_id(self._vm_id)
        devices = self._root.find("devices")
        if devices is None:
            raise InvalidValueError("the domain has no devices")
        present = [disk for disk in devices.findall("disk") if _is_temporary(disk)]
        for disk in present if path is None else present[1:]:
            devices.remove(disk)
        if path is None:
            return
        source = DiskSource(disk_id, TEMP_SLOT, "raw", path)
        if present:
            set_source(present[0], source)
            for serial in present[0].findall("serial"):  # of another VM's disk in a copied definition
                serial.text = disk_id.hex[:20]
        else:
            element = disk_element(source, target=free_target(self._root))
            devices.append(parse_xml(element, kind="disk element"))

    def set_tpm_encryption(self, *, encrypted: bool) -> None:
        """Add or remove the encryption of the emulated TPM's state with our DEK. No effect without a TPM."""
        backend = emulated_tpm(self._root)
        if backend is None:
            return
        for element in backend.findall("encryption"):
            backend.remove(element)
        if encrypted:
            ET.SubElement(backend, "encryption", secret=str(SecretName(self._vm_id, TPM_SLOT).uuid))

    def exclude_memory_from_core_dumps(self) -> None:
        """Set ``dumpCore='off'`` unless the definition has the attribute."""
        memory = self._root.find("memory")
        if memory is not None and memory.get("dumpCore") is None:
            memory.set("dumpCore", "off")

    def set_preload(self, library: Path, settings: Mapping[str, str], *, preloaded: bool) -> None:
        """Add or remove a preloaded library and the variables *settings*; see :mod:`.qemu_environment`.

        :raise InvalidValueError: When the domain preloads another library.
        """
        change = qemu_environment.preload if preloaded else qemu_environment.drop_preload
        change(self._root, library, settings)


def with_uuid(definition: DomainDefinition) -> DomainDefinition:
    """The definition with a new UUID; the definition itself if it has one.

    :raise InvalidValueError: When the definition has an invalid UUID.
    """
    root, prefixes = definition.copy_tree()
    if root.find("uuid") is not None:
        return DomainEdit(definition).result()
    element = ET.Element("uuid")
    element.text = str(uuid.uuid4())
    root.insert(0, element)
    return DomainDefinition(to_text(root, prefixes), root, prefixes)


def _is_temporary(disk: ET.Element) -> bool:
    usages = [secret.get("usage", "") for secret in disk.iter("secret")]
    return any(text.startswith(PREFIX) and text.endswith(f":{TEMP_SLOT}") for text in usages)
