"""Definitions of the domains of a scale set, from one template (libvirt formatdomain)."""

from __future__ import annotations

from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.disk_element import target_of
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.xml import parse_with_prefixes, parse_xml, to_text


def template_of(xml: str) -> str:
    """A definition without all that belongs to a single domain: name, UUID, MAC addresses.

    :raise InvalidValueError: When *xml* is no domain XML, has no devices, or mentions disks or settings of
        virt-sse.
    """
    root, prefixes = parse_with_prefixes(xml, kind="domain XML")
    devices = root.find("devices")
    if root.tag != "domain" or devices is None:
        raise InvalidValueError("invalid domain XML: no <domain> with <devices>")
    if DomainDefinition.salvage(xml).mentions_us:
        raise InvalidValueError(
            "the definition has disks or settings of virt-sse",
            hint="the scale set adds a disk to each instance; pass a definition without",
        )
    for name in ("name", "uuid"):
        for element in root.findall(name):
            root.remove(element)
    for interface in devices.iterfind("interface"):
        for address in interface.findall("mac"):
            interface.remove(address)
    return to_text(root, prefixes)


def instance_xml(template: str, *, name: str, domain_id: UUID, disk: str) -> str:
    """The definition of an instance.

    :param template: from :func:`template_of`.
    :param disk: the ``<disk>`` element to be the first of the domain's disks.
    :raise InvalidValueError: When the template has a disk with the same target.
    """
    root, prefixes = parse_with_prefixes(template, kind="domain XML")
    devices = root.find("devices")
    assert devices is not None  # noqa: S101 -- template_of has checked
    element = parse_xml(disk, kind="disk element")
    if any(target_of(other) == target_of(element) for other in devices.iterfind("disk")):
        raise InvalidValueError(f"the definition has a disk {target_of(element)!r} of its own")
    places = [position for position, each in enumerate(devices) if each.tag == "disk"]
    devices.insert(places[0] if places else 0, element)
    for position, (tag, text) in enumerate((("name", name), ("uuid", str(domain_id)))):
        child = root.makeelement(tag, {})
        child.text = text
        root.insert(position, child)
    return to_text(root, prefixes)
