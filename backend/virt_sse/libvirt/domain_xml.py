"""The parts of a domain's XML that are ours (libvirt formatdomain, formatstorageencryption)."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.references import parse_usage, usage
from virt_sse.libvirt.users import User
from virt_sse.model.slots import TEMP_SLOT

# Domain XML comes from libvirtd, which is trusted; ElementTree resolves no external entities.

_TARGET = re.compile(r"(?:vd|sd|hd)[a-z]{1,2}")
_BUSES = {"vd": "virtio", "sd": "scsi", "hd": "ide"}


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk of ours in a domain.

    :ivar source: the image, or the NBD server's Unix socket, that the domain names; ``None`` if neither.
    :ivar target: its name in the guest, e.g. ``vda``.
    :ivar reconnects: whether QEMU connects again to an NBD server that was gone; libvirt has it from 9.5.
    """

    disk_id: UUID
    slot: str
    source: Path | None
    target: str
    reconnects: bool = False


def our_disks(xml: str) -> list[DomainDisk]:
    """Every use of a DEK of a disk of ours in the domain *xml*, backing files included.

    :raise InvalidValueError: When the XML makes no sense, or a secret in it that is named like ours.
    """
    return [use for use in _our_uses(xml) if use.slot != TEMP_SLOT]


def temp_disks(xml: str) -> list[DomainDisk]:
    """Every use of a temporary disk in the domain *xml*; more than one, or another VM's, makes no sense.

    :raise InvalidValueError: As for :func:`our_disks`.
    """
    return [use for use in _our_uses(xml) if use.slot == TEMP_SLOT]


def _our_uses(xml: str) -> list[DomainDisk]:
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
                name = target.get("dev", "") if target is not None else ""
                reconnects = place.find("source/reconnect") is not None
                found.append(DomainDisk(*reference, _source(place), name, reconnects))
    return found


def _source(place: ET.Element) -> Path | None:
    source = place.find("source")
    host = place.find("source[@protocol='nbd']/host[@transport='unix']")
    name = host.get("socket") if host is not None else source.get("file") if source is not None else None
    return Path(name) if name else None


def _secrets(disk: ET.Element) -> Iterator[tuple[ET.Element, ET.Element]]:
    """All encryption secrets of a disk, each with the element whose ``<source>`` it is for."""
    for place in (disk, *disk.iter("backingStore"), *disk.iter("mirror")):
        for path in ("./encryption/secret", "./source/encryption/secret"):
            for secret in place.iterfind(path):
                yield place, secret


@dataclass(frozen=True, slots=True)
class Behind:
    """What stands between a domain and its disk's image.

    :ivar socket: where an NBD server answers.
    :ivar reconnect_seconds: how long requests wait for one that has gone.
    """

    socket: Path
    reconnect_seconds: int


@dataclass(frozen=True, slots=True)
class DiskSource:
    """How a domain finds a disk of ours.

    :ivar driver_type: libvirt's name of the format that QEMU sees.
    :ivar path: the image.
    :ivar behind: what it is behind, if it is not opened by QEMU itself.
    :ivar error_policy: libvirt's, for reads and writes that fail; default libvirt's own.
    """

    disk_id: UUID
    slot: str
    driver_type: str
    path: Path
    behind: Behind | None = None
    error_policy: str | None = None

    @property
    def place(self) -> Path:
        """What :attr:`DomainDisk.source` is for it."""
        return self.behind.socket if self.behind else self.path


def disk_element(source: DiskSource, *, target: str, read_only: bool = False) -> str:
    """The ``<disk>`` element with which a domain uses a disk of ours.

    libvirt leaves it out of snapshots that do not name it. One would go into a plaintext overlay, or,
    internal and with memory, end QEMU, whose qcow2 driver asserts that encrypted state comes in sectors.

    :param target: the name in the guest; its first letters choose the bus.
    :raise InvalidValueError: When *target* is no such name.
    """
    if not _TARGET.fullmatch(target):
        raise InvalidValueError(f"{target[:20]!r} is no target", hint="e.g. vdb, sda or hda")
    disk = ET.Element("disk", type="file", device="disk", snapshot="no")
    ET.SubElement(disk, "driver", name="qemu")
    ET.SubElement(disk, "source")
    set_source(disk, source)
    ET.SubElement(disk, "target", dev=target, bus=_BUSES[target[:2]])
    if read_only:
        ET.SubElement(disk, "readonly")
    ET.SubElement(disk, "serial").text = source.disk_id.hex[:20]
    ET.indent(disk)
    return ET.tostring(disk, encoding="unicode") + "\n"


def set_source(disk: ET.Element, source: DiskSource) -> None:
    """Make the ``<disk>`` element *disk* find its data by *source*, and leave the rest of it as it is."""
    driver, place = disk.find("driver"), disk.find("source")
    if driver is None or place is None:
        raise InvalidValueError("a disk without a driver or a source")
    driver.set("type", source.driver_type)
    driver.set("discard", "unmap")
    for name in ("error_policy", "rerror_policy"):
        driver.attrib.pop(name, None)
        if source.error_policy:
            driver.set(name, source.error_policy)
    place.clear()
    if source.behind:
        disk.set("type", "network")
        place.attrib |= {"protocol": "nbd", "name": str(source.disk_id)}
        ET.SubElement(place, "host", transport="unix", socket=str(source.behind.socket))
        ET.SubElement(place, "reconnect", delay=str(source.behind.reconnect_seconds))
    else:
        disk.set("type", "file")
        place.set("file", str(source.path))
    encryption = ET.SubElement(place, "encryption", format="luks")
    ET.SubElement(encryption, "secret", type="passphrase", usage=usage(source.disk_id, source.slot))


def with_sources(xml: str, sources: Mapping[UUID, DiskSource]) -> str:
    """The domain *xml* with the disks of those ids found there; to the byte the same if they are already."""
    root = ET.fromstring(xml)  # noqa: S314 -- see above
    before = ET.tostring(root)
    for disk in root.iterfind("./devices/disk"):
        for _, secret in _secrets(disk):
            reference = parse_usage(secret.get("usage", ""))
            if reference and reference[0] in sources:
                set_source(disk, sources[reference[0]])
                break
    return ET.tostring(root, encoding="unicode") if ET.tostring(root) != before else xml


def domain_uuid(xml: str) -> UUID:
    """The UUID of the domain *xml*.

    :raise InvalidValueError: When it has none.
    """
    try:
        return UUID(ET.fromstring(xml).findtext("uuid", ""))  # noqa: S314 -- see above
    except (ET.ParseError, ValueError) as exc:
        raise InvalidValueError(f"not a domain's XML: {exc}") from exc


def qemu_user(xml: str) -> User | None:
    """Whom the QEMU of the domain *xml* runs as, once libvirt has begun to start it (libvirt formatdomain,
    seclabel).
    """
    for label in ET.fromstring(xml).iterfind("./seclabel[@model='dac']/label"):  # noqa: S314 -- see above
        return User.parse(label.text or "")
    return None


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
