"""Where the data of a domain's disks lies, whoever made them (libvirt formatdomain, "Hard drives")."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.references import parse_usage
from virt_sse.model.slots import TEMP_SLOT

_WITH_FILES = {"file": "file", "block": "dev"}
"""By the disk's type: the attribute of its source that holds a path."""


@dataclass(frozen=True, slots=True)
class DiskPlace:
    """A disk of a domain.

    :ivar target: its name in the guest, e.g. ``vda``.
    :ivar disk_id: of a disk of ours, and nothing else is told then.
    :ivar path: the image or block device; ``None`` when there is none.
    :ivar format: libvirt's and QEMU's name of the image's format.
    :ivar volume: where a storage pool has it: the pool's name, and the volume's.
    :ivar obstacle: why its data cannot be had from the path, in words.
    """

    target: str
    disk_id: UUID | None = None
    path: Path | None = None
    format: str = "raw"
    volume: tuple[str, str] | None = None
    obstacle: str | None = None


def disk_places(xml: str) -> list[DiskPlace]:
    """The disks of the domain *xml*; without CD and floppy drives, and without temporary disks of ours.

    :raise InvalidValueError: When the XML makes no sense, or a secret in it that is named like ours.
    """
    try:
        # It comes from libvirtd, which is trusted; ElementTree resolves no external entities.
        root = ET.fromstring(xml)  # noqa: S314
        places = [
            _place(disk)
            for disk in root.iterfind("./devices/disk")
            if disk.get("device", "disk") in ("disk", "lun")
        ]
    except (ET.ParseError, ValueError) as exc:
        raise InvalidValueError(f"not a domain's XML: {exc}") from exc
    return [place for place in places if place is not None]


def _place(disk: ET.Element) -> DiskPlace | None:
    kind = disk.get("type", "")
    named, source, driver = disk.find("target"), disk.find("source"), disk.find("driver")
    target = named.get("dev", "") if named is not None else ""
    for path in ("./encryption/secret", "./source/encryption/secret"):
        for secret in disk.iterfind(path):
            if reference := parse_usage(secret.get("usage", "")):
                disk_id, slot = reference
                return DiskPlace(target, disk_id=disk_id) if slot != TEMP_SLOT else None
    if disk.find("./encryption") is not None or disk.find("./source/encryption") is not None:
        return DiskPlace(target, obstacle="it is encrypted, and not by virt-sse")
    if disk.find("./source/slices") is not None:
        return DiskPlace(target, obstacle="it is a slice of an image")
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    if source is not None and kind == "volume":
        return DiskPlace(
            target, format=image_format, volume=(source.get("pool", ""), source.get("volume", ""))
        )
    if source is not None and kind in _WITH_FILES and (name := source.get(_WITH_FILES[kind])):
        return DiskPlace(target, path=Path(name), format=image_format)
    return DiskPlace(target, obstacle=f"its type is {kind!r}, not a file or block device")
