"""Thin calls of :mod:`virt_sse.libvirt.domain_definition` for callers that still hand on text."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from uuid import UUID

from virt_sse.libvirt import disk_element as _element
from virt_sse.libvirt.disk_element import Behind, DiskSource, DomainDisk, disk_element, set_source
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.users import User
from virt_sse.libvirt.xml import parse_xml

__all__ = [
    "Behind",
    "DiskSource",
    "DomainDisk",
    "disk_element",
    "domain_uuid",
    "free_target",
    "our_disks",
    "qemu_user",
    "set_source",
    "temp_disks",
    "with_sources",
]


def our_disks(xml: str) -> list[DomainDisk]:
    return list(DomainDefinition.parse(xml).our_disks)


def temp_disks(xml: str) -> list[DomainDisk]:
    return list(DomainDefinition.parse(xml).temp_disks)


def with_sources(xml: str, sources: Mapping[UUID, DiskSource]) -> str:
    root = parse_xml(xml, kind="domain XML")
    before = ET.tostring(root)
    for disk in root.iterfind("./devices/disk"):
        for use in _element.dek_uses(disk):
            if use.disk_id in sources:
                set_source(disk, sources[use.disk_id])
                break
    return ET.tostring(root, encoding="unicode") if ET.tostring(root) != before else xml


def domain_uuid(xml: str) -> UUID:
    return DomainDefinition.parse(xml).uuid


def qemu_user(xml: str) -> User | None:
    return DomainDefinition.parse(xml).qemu_user


def free_target(xml: str) -> str:
    return DomainDefinition.parse(xml).free_target()
