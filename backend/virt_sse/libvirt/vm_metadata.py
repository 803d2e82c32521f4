"""The metadata element with the properties of a VM (libvirt formatdomain, "General metadata").

The element is ``<virt-sse:vm xmlns:virt-sse="https://virt-sse.invalid/vm/1" encryption-at-host="on"
size="Standard_D2s_v3" temp-disk-size="10737418240" generation="1"/>``. libvirt stores the element and ignores
the content. An update changes the element and the rest of the definition in a single define, so the two
always agree.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.secret_name import PREFIX, SecretName
from virt_sse.libvirt.xml import parse_with_prefixes, parse_xml, to_text
from virt_sse.model.disks import check_size
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import VmProperties, check_size_name, temp_disk_id

VM_NAMESPACE = "https://virt-sse.invalid/vm/1"
VM_PREFIX = "virt-sse"
_TAG = f"{{{VM_NAMESPACE}}}vm"
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Stated:
    """Content of the metadata element.

    :ivar generation: number of the update that wrote the element.
    """

    properties: VmProperties
    generation: int


def read_metadata(domain: ET.Element) -> Stated | None:
    """Read the metadata element; ``None`` without such an element.

    :param domain: the ``<domain>`` element.
    :raise InvalidValueError: When the element is invalid, or present twice.
    """
    found = domain.findall(f"./metadata/{_TAG}")
    if not found:
        return None
    if len(found) > 1:
        raise InvalidValueError("the domain's metadata has two elements of virt-sse instead of one")
    (element,) = found
    try:
        temp_size = element.get("temp-disk-size")
        size = element.get("size")
        return Stated(
            VmProperties(
                _SWITCH[element.get("encryption-at-host", "")],
                check_size_name(size) if size is not None else None,
                check_size(int(temp_size)) if temp_size is not None else None,
            ),
            int(element.get("generation", "")),
        )
    except (ValueError, KeyError, InvalidValueError) as exc:
        raise InvalidValueError(f"the domain's metadata is invalid: {exc}") from exc


def write_metadata(domain: ET.Element, stated: Stated) -> None:
    """Replace the metadata element in the ``<domain>`` element *domain*."""
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(domain, "metadata")
    for element in metadata.findall(_TAG):
        metadata.remove(element)
    properties = stated.properties
    element = ET.SubElement(metadata, _TAG)
    element.set("encryption-at-host", "on" if properties.encryption_at_host else "off")
    if properties.size is not None:
        element.set("size", properties.size)
    if properties.temp_disk_size is not None:
        element.set("temp-disk-size", str(properties.temp_disk_size))
    element.set("generation", str(stated.generation))


# Thin calls for callers that still hand on text or element trees.


def parse(xml: str) -> ET.Element:
    root, prefixes = parse_with_prefixes(xml, kind="domain XML")
    to_text(ET.Element("x"), {**prefixes, VM_PREFIX: VM_NAMESPACE})
    return root


stated = read_metadata
state = write_metadata


def has_encryption_at_host(xml: str) -> bool:
    from virt_sse.libvirt.domain_definition import DomainDefinition

    return DomainDefinition.parse(xml).has_encryption_at_host


def secrets_of_vm(xml: str) -> list[tuple[UUID, str]]:
    from virt_sse.libvirt.domain_definition import DomainDefinition

    return [(name.owner, name.slot) for name in DomainDefinition.parse(xml).vm_secrets]


def set_temp_disk(root: ET.Element, vm_id: UUID, path: Path | None) -> None:
    """Give the definition the temporary disk whose image lies at *path*, or take it out.

    One that is there stays as it is, but for its image: its place among the guest's devices may be an
    operator's.

    :raise InvalidValueError: When there is no room for one.
    """
    from virt_sse.libvirt.disk_element import DiskSource, disk_element, free_target, set_source

    disk_id = temp_disk_id(vm_id)
    devices = root.find("devices")
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
        for serial in present[0].findall("serial"):  # another VM's, in a copy of its definition
            serial.text = disk_id.hex[:20]
    else:
        target = free_target(root)
        devices.append(parse_xml(disk_element(source, target=target), kind="disk"))


def _is_temporary(disk: ET.Element) -> bool:
    usages = [secret.get("usage", "") for secret in disk.iter("secret")]
    return any(text.startswith(PREFIX) and text.endswith(f":{TEMP_SLOT}") for text in usages)


def emulated_tpm(root: ET.Element) -> ET.Element | None:
    """The ``<backend>`` of the domain's emulated TPM, if it has one."""
    return root.find("./devices/tpm/backend[@type='emulator']")


def tpm_secret(root: ET.Element) -> UUID | None:
    """The UUID of the libvirt secret that the emulated TPM's state is encrypted with, whosever it is."""
    backend = emulated_tpm(root)
    encryption = backend.find("encryption") if backend is not None else None
    try:
        return UUID(encryption.get("secret", "")) if encryption is not None else None
    except ValueError as exc:
        raise InvalidValueError(f"the domain's TPM names an unknown secret: {exc}") from exc


def has_tpm_of_ours(root: ET.Element, vm_id: UUID) -> bool:
    """Whether the state of the domain's emulated TPM is encrypted with a DEK of ours."""
    return tpm_secret(root) == SecretName(vm_id, TPM_SLOT).uuid


def set_tpm_encryption(root: ET.Element, vm_id: UUID, *, encrypted: bool) -> None:
    """Let the emulated TPM's state be encrypted with the DEK of ours, or not at all."""
    backend = emulated_tpm(root)
    if backend is None:
        return
    for element in backend.findall("encryption"):
        backend.remove(element)
    if encrypted:
        ET.SubElement(backend, "encryption", secret=str(SecretName(vm_id, TPM_SLOT).uuid))
