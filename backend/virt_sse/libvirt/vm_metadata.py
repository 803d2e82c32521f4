"""The metadata element with the properties of a VM (libvirt formatdomain, "General metadata").

The element is ``<virt-sse:vm xmlns:virt-sse="https://virt-sse.invalid/vm/1" encryption-at-host="on"
size="Standard_D2s_v3" temp-disk-size="10737418240" generation="1"/>``. libvirt stores the element and ignores
the content. An update changes the element and the rest of the definition in a single define, so the two
always agree.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from virt_sse.errors import InvalidValueError
from virt_sse.model.disks import check_size
from virt_sse.model.vms import VmProperties, check_size_name

VM_NAMESPACE = "https://virt-sse.invalid/vm/1"
VM_PREFIX = "virt-sse"
_TAG = f"{{{VM_NAMESPACE}}}vm"
_LONGEST_REASON = 200
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
                check_size(_number(temp_size, digits=15)) if temp_size is not None else None,
            ),
            _number(element.get("generation", ""), digits=9),  # fits into the store's column
        )
    except (ValueError, KeyError, InvalidValueError) as exc:
        raise InvalidValueError(f"the domain's metadata is invalid: {str(exc)[:_LONGEST_REASON]}") from exc


def _number(text: str, *, digits: int) -> int:
    """Read a number as written by :func:`write_metadata`.

    :raise ValueError: When *text* is anything else, or has more than *digits* digits.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > digits:
        raise ValueError(f"{text[:40]!r} is not a number of at most {digits} digits")
    return int(text)


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
