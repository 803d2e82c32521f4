"""The parts of a domain's XML that are ours (libvirt formatdomain, formatstorageencryption)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.references import parse_usage, usage

# Domain XML comes from libvirtd, which is trusted; ElementTree resolves no external entities.

_TARGET = re.compile(r"(?:vd|sd|hd)[a-z]{1,2}")
_BUSES = {"vd": "virtio", "sd": "scsi", "hd": "ide"}


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of ours in a domain.

    :ivar source: the image that the domain names; ``None`` when it is not a file.
    :ivar target: its name in the guest, e.g. ``vda``.
    """

    disk_id: UUID
    slot: str
    source: Path | None
    target: str


def our_disks(xml: str) -> list[DomainDisk]:
    """Every use of a DEK of ours in the domain *xml*, backing files included.

    :raise InvalidValueError: When the XML makes no sense, or a secret in it that is named like ours.
    """
    try:
        root = ET.fromstring(xml)  # noqa: S314 -- see above
    except ET.ParseError as exc:
        raise InvalidValueError(f"not a domain's XML: {exc}") from exc
    found = []
    for disk in root.iterfind("./devices/disk"):
        target = disk.find("target")
        for place, secret in _secrets(disk):
            try:
                reference = parse_usage(secret.get("usage", ""))
            except ValueError as exc:
                raise InvalidValueError(f"the domain names an unknown secret: {exc}") from exc
            if reference:
                source = place.find("source")
                file = source.get("file") if source is not None else None
                name = target.get("dev", "") if target is not None else ""
                found.append(DomainDisk(*reference, Path(file) if file else None, name))
    return found


def _secrets(disk: ET.Element) -> Iterator[tuple[ET.Element, ET.Element]]:
    """All encryption secrets of a disk, each with the element whose ``<source>`` it is for."""
    for place in (disk, *disk.iter("backingStore"), *disk.iter("mirror")):
        for path in ("./encryption/secret", "./source/encryption/secret"):
            for secret in place.iterfind(path):
                yield place, secret


def disk_element(
    *, path: Path, driver_type: str, disk_id: UUID, slot: str, target: str, read_only: bool = False
) -> str:
    """The ``<disk>`` element with which a domain uses a disk of ours.

    :param driver_type: libvirt's name of the image's format.
    :param target: the name in the guest; its first letters choose the bus.
    :raise InvalidValueError: When *target* is no such name.
    """
    if not _TARGET.fullmatch(target):
        raise InvalidValueError(f"{target[:20]!r} is no target", hint="e.g. vdb, sda or hda")
    disk = ET.Element("disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type=driver_type, discard="unmap")
    source = ET.SubElement(disk, "source", file=str(path))
    encryption = ET.SubElement(source, "encryption", format="luks")
    ET.SubElement(encryption, "secret", type="passphrase", usage=usage(disk_id, slot))
    ET.SubElement(disk, "target", dev=target, bus=_BUSES[target[:2]])
    if read_only:
        ET.SubElement(disk, "readonly")
    ET.SubElement(disk, "serial").text = disk_id.hex[:20]
    ET.indent(disk)
    return ET.tostring(disk, encoding="unicode") + "\n"


def free_target(xml: str) -> str:
    """The first virtio name, ``vda`` to ``vdz``, that the domain *xml* does not use.

    :raise InvalidValueError: When all are in use.
    """
    root = ET.fromstring(xml)  # noqa: S314 -- see above
    used = {target.get("dev") for target in root.iterfind("./devices/disk/target")}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        if f"vd{letter}" not in used:
            return f"vd{letter}"
    raise InvalidValueError("the domain has no free virtio target")
