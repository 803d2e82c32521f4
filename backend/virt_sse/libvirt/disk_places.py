"""Locations of the data of all disks of a domain (libvirt formatdomain, "Hard drives")."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.libvirt.disk_element import disks_named, target_of
from virt_sse.model.slots import TEMP_SLOT

_WITH_FILES = {"file": "file", "block": "dev"}
"""By disk type: the attribute of ``<source>`` with the path."""


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """Location of a disk's data.

    :ivar target: the disk's name in the guest, e.g. ``vda``.
    :ivar disk_id: id of a disk of ours; all following attributes then keep their defaults.
    :ivar path: the image or block device; ``None`` if unknown.
    :ivar format: libvirt's and QEMU's name of the image format.
    :ivar volume: name of the storage pool, and name of the volume in the pool.
    :ivar obstacle: why the data cannot be read from a path, for an error message.
    """

    target: str
    disk_id: UUID | None = None
    path: Path | None = None
    format: str = "raw"
    volume: tuple[str, str] | None = None
    obstacle: str | None = None


def disk_place(disk: ET.Element) -> DiskPlace | None:
    """The location of a disk's data; ``None`` for CD and floppy drives, and for temporary disks of ours.

    :param disk: a ``<disk>`` element.
    :raise InvalidValueError: When a secret's usage id or an export has our prefix and is malformed.
    """
    if disk.get("device", "disk") not in ("disk", "lun"):
        return None
    kind = disk.get("type", "")
    source, driver = disk.find("source"), disk.find("driver")
    target = target_of(disk)
    for disk_id, slot in disks_named(disk):
        return DiskPlace(target, disk_id=disk_id) if slot != TEMP_SLOT else None
    if disk.find("./encryption") is not None or disk.find("./source/encryption") is not None:
        return DiskPlace(target, obstacle="the image is encrypted, but not by virt-sse")
    if disk.find("./source/slices") is not None:
        return DiskPlace(target, obstacle="the disk is a slice of an image")
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    if source is not None and kind == "volume":
        return DiskPlace(
            target, format=image_format, volume=(source.get("pool", ""), source.get("volume", ""))
        )
    if source is not None and kind in _WITH_FILES and (path := source.get(_WITH_FILES[kind])):
        return DiskPlace(target, path=Path(path), format=image_format)
    return DiskPlace(target, obstacle=f"disk type {kind!r} is neither a file nor a block device")
