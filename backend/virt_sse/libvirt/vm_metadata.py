"""What a domain's definition says of a VM of ours, and how it is written there (libvirt formatdomain).

The metadata element is ``<virt-sse:vm xmlns:virt-sse="https://virt-sse.invalid/vm/1" encryption-at-host="on"
size="Standard_D2s_v3" temp-disk-size="10737418240" generation="1"/>``. libvirt keeps it and does not read it.
It is changed in one define with all else that an update changes in a definition, so that there is no moment
at which it says what the rest of the definition is not.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt import domain_xml
from virt_sse.libvirt.domain_xml import DiskSource
from virt_sse.libvirt.references import PREFIX, VM_NAMESPACE, secret_uuid
from virt_sse.model.disks import check_size
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import VmProperties, check_size_name, temp_disk_id

_PREFIX = "virt-sse"
_TAG = f"{{{VM_NAMESPACE}}}vm"
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Stated:
    """What the metadata says.

    :ivar generation: of the update that wrote it.
    """

    properties: VmProperties
    generation: int


def parse(xml: str) -> ET.Element:
    """A domain's XML, with its namespaces' prefixes kept for when it is written again.

    :raise InvalidValueError: When it makes no sense.
    """
    try:
        for _, (prefix, uri) in ET.iterparse(io.BytesIO(xml.encode()), events=["start-ns"]):  # noqa: S314 -- from libvirtd, which is trusted
            if prefix and not re.fullmatch(r"ns\d+", prefix):
                ET.register_namespace(prefix, uri)
        return ET.fromstring(xml)  # noqa: S314 -- likewise
    except ET.ParseError as exc:
        raise InvalidValueError(f"not a domain's XML: {exc}") from exc


def stated(root: ET.Element) -> Stated | None:
    """What the definition's metadata says of the VM; ``None`` when it has none of ours.

    :raise InvalidValueError: When it makes no sense.
    """
    found = root.findall(f"./metadata/{_TAG}")
    if not found:
        return None
    if len(found) > 1:
        raise InvalidValueError("the domain's metadata says twice what virt-sse is to do")
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
        raise InvalidValueError(f"the domain's metadata makes no sense: {exc}") from exc


def has_encryption_at_host(xml: str) -> bool:
    """Whether the definition says that the VM has encryption at host.

    :raise InvalidValueError: When it makes no sense.
    """
    said = stated(parse(xml)) if VM_NAMESPACE in xml else None
    return said is not None and said.properties.encryption_at_host


def state(root: ET.Element, said: Stated) -> None:
    """Let the definition's metadata say *said*."""
    ET.register_namespace(_PREFIX, VM_NAMESPACE)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.SubElement(root, "metadata")
    for element in metadata.findall(_TAG):
        metadata.remove(element)
    properties = said.properties
    element = ET.SubElement(metadata, _TAG)
    element.set("encryption-at-host", "on" if properties.encryption_at_host else "off")
    if properties.size is not None:
        element.set("size", properties.size)
    if properties.temp_disk_size is not None:
        element.set("temp-disk-size", str(properties.temp_disk_size))
    element.set("generation", str(said.generation))


def secrets_of_vm(xml: str) -> list[tuple[UUID, str]]:
    """The secrets that are the VM's own, not those of a disk in the store: by id and slot.

    :raise InvalidValueError: When the XML makes no sense.
    """
    found = []
    root = parse(xml)
    vm_id = domain_xml.domain_uuid(xml)
    own = temp_disk_id(vm_id)  # another VM's, which it must not have, stays that one's
    if any(use.disk_id == own for use in domain_xml.temp_disks(xml)):
        found.append((own, TEMP_SLOT))
    if has_tpm_of_ours(root, vm_id):
        found.append((vm_id, TPM_SLOT))
    return found


def set_temp_disk(root: ET.Element, vm_id: UUID, path: Path | None) -> None:
    """Give the definition the temporary disk whose image lies at *path*, or take it out.

    One that is there stays as it is, but for its image: its place among the guest's devices may be an
    operator's.

    :raise InvalidValueError: When there is no room for one.
    """
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
        domain_xml.set_source(present[0], source)
        for serial in present[0].findall("serial"):  # another VM's, in a copy of its definition
            serial.text = disk_id.hex[:20]
    else:
        target = domain_xml.free_target(ET.tostring(root, encoding="unicode"))
        devices.append(ET.fromstring(domain_xml.disk_element(source, target=target)))  # noqa: S314 -- ours


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
    return tpm_secret(root) == secret_uuid(vm_id, TPM_SLOT)


def set_tpm_encryption(root: ET.Element, vm_id: UUID, *, encrypted: bool) -> None:
    """Let the emulated TPM's state be encrypted with the DEK of ours, or not at all."""
    backend = emulated_tpm(root)
    if backend is None:
        return
    for element in backend.findall("encryption"):
        backend.remove(element)
    if encrypted:
        ET.SubElement(backend, "encryption", secret=str(secret_uuid(vm_id, TPM_SLOT)))
