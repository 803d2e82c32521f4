"""The ``<disk>`` element of a disk of ours: reading and writing.

Sources: libvirt formatdomain, formatstorageencryption.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.secret_name import SecretName, exported_disk, plain_export
from virt_sse.model.ceph import CephCluster
from virt_sse.model.cloud import DriverOptions
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.layers import Placement
from virt_sse.system.rbd_names import PREFIX as RBD_PREFIX
from virt_sse.system.rbd_names import RbdName

_TARGET = re.compile(r"(?:vd|sd|hd)[a-z]{1,2}")
_BUSES = {"vd": DiskBus.VIRTIO, "sd": DiskBus.SCSI, "hd": DiskBus.IDE}
"""The bus of a name, unless stated."""


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """Use of a disk of ours by a disk of a domain: of its DEK, or of the NBD export of its plaintext.

    :ivar slot: slot of the DEK for the guest's QEMU; ``None`` if a process below decrypts the disk.
    :ivar source: place of the image, or path of the NBD server's Unix socket; ``None`` for any other source.
    :ivar target: the disk's name in the guest, e.g. ``vda``.
    :ivar reconnects: whether QEMU reconnects to a restarted NBD server (libvirt 9.5 and later).
    :ivar read_only: whether the guest can only read the disk.
    :ivar iothread: number of the iothread that serves the disk; ``None`` for QEMU's main thread.
    """

    disk_id: UUID
    slot: str | None
    source: Path | None
    target: str
    reconnects: bool = False
    read_only: bool = False
    iothread: str | None = None

    @property
    def secret(self) -> SecretName | None:
        """Name of the libvirt secret with the DEK; ``None`` if the guest's QEMU needs no DEK."""
        return SecretName(self.disk_id, self.slot) if self.slot is not None else None

    @property
    def placement(self) -> Placement:
        """The placement that the domain's definition expects."""
        return Placement.STORAGE if self.slot is None else Placement.GUEST


@dataclass(frozen=True, slots=True)
class Behind:
    """NBD server between a domain and the disk's image.

    :ivar socket: Unix socket of the server.
    :ivar reconnect_seconds: how long requests wait for a lost server.
    """

    socket: Path
    reconnect_seconds: int


@dataclass(frozen=True, slots=True)
class DiskSource:
    """Source of an encrypted disk, as a domain definition has to name the source.

    :ivar slot: slot of the DEK for the guest's QEMU; ``None`` if a process below decrypts the disk.
    :ivar driver_type: libvirt's name of the image format that QEMU sees.
    :ivar path: the image.
    :ivar behind: NBD server in front of the image; ``None`` if QEMU opens the image itself.
    :ivar error_policy: libvirt's policy for failed reads and writes; ``None`` for libvirt's default.
    :ivar serial: serial number for guests; default: derived from the id.
    :ivar is_device: whether the image is a block device.
    :ivar cluster: the Ceph cluster of an RBD image; else ``None``.
    """

    disk_id: UUID
    slot: str | None
    driver_type: str
    path: Path
    behind: Behind | None = None
    error_policy: str | None = None
    serial: str | None = None
    is_device: bool = False
    cluster: CephCluster | None = None

    @property
    def place(self) -> Path:
        """The path that :attr:`DomainDisk.source` has for this source."""
        return self.behind.socket if self.behind else self.path

    def use(self, target: str) -> DomainDisk:
        """The use that :func:`disk_element` writes for a disk that is not read-only."""
        return DomainDisk(self.disk_id, self.slot, self.place, target, reconnects=self.behind is not None)


def disk_element(
    source: DiskSource,
    *,
    target: str,
    bus: DiskBus | None = None,
    read_only: bool = False,
    iothread: int | None = None,
    options: DriverOptions | None = None,
) -> str:
    """Return the ``<disk>`` element with which a domain uses an encrypted disk.

    ``snapshot='no'`` excludes the disk from snapshots that do not name the disk. An external snapshot would
    write to a plaintext overlay. An internal snapshot with memory would abort QEMU: the qcow2 driver asserts
    that encrypted VM state is a multiple of the sector size.

    :param target: the name in the guest.
    :param bus: default: virtio, SCSI or IDE, by the first two letters of *target*.
    :param iothread: the iothread of the domain that serves the disk.
    :param options: options of the driver.
    :raise InvalidValueError: When *target* is invalid, not a name on *bus*, or on a bus whose disks have no
        iothread.
    """
    if not _TARGET.fullmatch(target):
        raise InvalidValueError(f"invalid target {target[:20]!r}", hint="e.g. vdb, sda or hda")
    bus = bus or _BUSES[target[:2]]
    if not target.startswith(bus.prefix):
        raise InvalidValueError(
            f"target {target!r} is no name of a {bus.value} disk", hint=f"e.g. {bus.prefix}a"
        )
    disk = ET.Element("disk", type="file", device="disk", snapshot="no")
    driver = ET.SubElement(disk, "driver", name="qemu")
    if iothread is not None:
        if bus is not DiskBus.VIRTIO:
            raise InvalidValueError(
                f"no iothread can serve {target}: only virtio disks have an iothread of their own",
                hint="choose a target such as vdb; with virtio-scsi the iothread belongs to the <controller>",
            )
        driver.set("iothread", str(iothread))
    ET.SubElement(disk, "source")
    set_source(disk, source)
    _set_options(disk, options or DriverOptions(), is_image=source.behind is None and source.cluster is None)
    ET.SubElement(disk, "target", dev=target, bus=bus.value)
    if read_only:
        ET.SubElement(disk, "readonly")
    ET.SubElement(disk, "serial").text = source.serial or source.disk_id.hex[:20]
    ET.indent(disk)
    return ET.tostring(disk, encoding="unicode") + "\n"


def _set_options(disk: ET.Element, options: DriverOptions, *, is_image: bool) -> None:
    """Set driver options of a new ``<disk>`` element.

    :param is_image: whether QEMU opens a file or device itself: only then has the I/O mode a meaning.
    """
    driver = disk.find("driver")
    assert driver is not None  # noqa: S101 -- made by the caller
    for name, value in (
        ("cache", options.cache),
        ("io", options.io if is_image else None),
        ("iothread", options.iothread),
    ):
        if value is not None:
            driver.set(name, str(value))
    if options.iotune:
        iotune = ET.SubElement(disk, "iotune")
        for name, limit in options.iotune.items():
            ET.SubElement(iotune, name).text = str(limit)


def set_source(disk: ET.Element, source: DiskSource) -> None:
    """Replace source and driver options of the ``<disk>`` element *disk*; all other children stay unchanged.

    A disk without ``<backingStore>`` gets an empty one: the disk has no backing file.

    :raise InvalidValueError: When *disk* has no driver or no source.
    """
    driver, place = disk.find("driver"), disk.find("source")
    if driver is None or place is None:
        raise InvalidValueError("the domain has a disk without a driver or a source")
    driver.set("type", source.driver_type)
    driver.set("discard", "unmap")
    for name in ("error_policy", "rerror_policy"):
        driver.attrib.pop(name, None)
        if source.error_policy:
            driver.set(name, source.error_policy)
    place.clear()
    for encryption in disk.findall("encryption"):  # by libvirt before 4.5
        disk.remove(encryption)
    if source.behind:
        disk.set("type", "network")
        export = str(source.disk_id) if source.slot is not None else plain_export(source.disk_id)
        place.attrib |= {"protocol": "nbd", "name": export}
        ET.SubElement(place, "host", transport="unix", socket=str(source.behind.socket))
        ET.SubElement(place, "reconnect", delay=str(source.behind.reconnect_seconds))
    elif source.cluster:
        _set_rbd(disk, place, source.cluster, RbdName.of(source.path))
    else:
        disk.set("type", "block" if source.is_device else "file")
        place.set("dev" if source.is_device else "file", str(source.path))
    for outside in disk.findall("encryption"):  # of the image before, as older versions of libvirt write it
        disk.remove(outside)
    if source.slot is not None:
        encryption = ET.SubElement(place, "encryption", format="luks")
        secret = SecretName(source.disk_id, source.slot)
        ET.SubElement(encryption, "secret", type="passphrase", usage=secret.usage)
    add_backing_store(disk)


def _set_rbd(disk: ET.Element, place: ET.Element, cluster: CephCluster, name: RbdName) -> None:
    disk.set("type", "network")
    place.attrib |= {"protocol": "rbd", "name": str(name)}
    for host, port in cluster.monitors:
        ET.SubElement(place, "host", name=host, port=str(port))
    auth = ET.SubElement(place, "auth", username=cluster.user)
    ET.SubElement(auth, "secret", type="ceph", usage=cluster.secret_usage)


def add_backing_store(disk: ET.Element) -> None:
    """Add an empty ``<backingStore>`` to the ``<disk>`` element *disk*, unless the element has one.

    Without, libvirt searches the image's header for backing files, and gives them to QEMU's user.
    """
    if disk.find("backingStore") is None:
        source = disk.find("source")
        position = len(disk) if source is None else list(disk).index(source) + 1
        disk.insert(position, ET.Element("backingStore"))


def uses_of(disk: ET.Element) -> Iterator[DomainDisk]:
    """All uses of disks of ours by the ``<disk>`` element *disk*, including backing files and mirrors.

    :raise InvalidValueError: When a secret's usage id or an export has our prefix and is malformed.
    """
    for place in (disk, *disk.iter("backingStore"), *disk.iter("mirror")):
        for disk_id, slot in disks_named(place):
            yield DomainDisk(
                disk_id,
                slot,
                _source(place),
                target_of(disk),
                reconnects=place.find("source/reconnect") is not None,
                read_only=disk.find("readonly") is not None,
                iothread=_iothread(disk),
            )


def disks_named(place: ET.Element) -> list[tuple[UUID, str | None]]:
    """The disks of ours, with slots of DEKs, named in a ``<disk>``, ``<backingStore>`` or ``<mirror>``.

    :raise InvalidValueError: When a secret's usage id or an export has our prefix and is malformed.
    """
    names = [secret_name(secret) for secret in encryption_secrets(place)]
    found: list[tuple[UUID, str | None]] = [(name.owner, name.slot) for name in names if name]
    source = place.find("source")
    if not found and source is not None and (disk_id := plain_disk(source)):
        found.append((disk_id, None))
    return found


def plain_disk(source: ET.Element) -> UUID | None:
    """The disk of ours whose plaintext a ``<source>`` element names; ``None`` for any other source.

    :raise InvalidValueError: When the export has our prefix and is malformed.
    """
    if source.get("protocol") != "nbd":
        return None
    try:
        return exported_disk(source.get("name", ""))
    except ValueError as exc:
        raise InvalidValueError(f"the domain names an unknown NBD export: {exc}") from exc


def _iothread(disk: ET.Element) -> str | None:
    driver = disk.find("driver")
    return driver.get("iothread") if driver is not None else None


def encryption_secrets(place: ET.Element) -> list[ET.Element]:
    """The encryption secrets of a ``<disk>``, ``<backingStore>`` or ``<mirror>``.

    Current libvirt writes ``<encryption>`` inside ``<source>``, older versions beside ``<source>``.
    """
    return [*place.iterfind("./encryption/secret"), *place.iterfind("./source/encryption/secret")]


def secret_name(secret: ET.Element) -> SecretName | None:
    """The name in a ``<secret>`` element; ``None`` for a secret that is not ours.

    :raise InvalidValueError: When the usage id has our prefix and is malformed.
    """
    try:
        return SecretName.parse(secret.get("usage", ""))
    except ValueError as exc:
        raise InvalidValueError(f"the domain names an unknown secret: {exc}") from exc


def drop_malformed_names(root: ET.Element) -> list[str]:
    """Remove malformed names with our prefix from all ``<secret>`` and ``<source>`` elements below *root*.

    :return: the removed names.
    """
    found = []
    for secret in root.iter("secret"):
        try:
            secret_name(secret)
        except InvalidValueError:
            found.append(secret.attrib.pop("usage"))
    for source in root.iter("source"):
        try:
            plain_disk(source)
        except InvalidValueError:
            found.append(source.attrib.pop("name"))
    return found


def target_of(disk: ET.Element) -> str:
    """The disk's name in the guest; empty if the element has none."""
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def free_target(domain: ET.Element, bus: DiskBus = DiskBus.VIRTIO) -> str:
    """The first name on *bus*, e.g. from ``vda`` to ``vdz``, that no disk of a ``<domain>`` element has.

    :raise InvalidValueError: When all names are in use.
    """
    used = {target.get("dev") for target in domain.iterfind("./devices/disk/target")}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        if (name := f"{bus.prefix}{letter}") not in used:
            return name
    raise InvalidValueError(f"the domain has no free {bus.value} target")


def rbd_place(source: ET.Element) -> Path | None:
    """The place of the RBD image that a ``<source>`` element names; ``None`` for any other source."""
    if source.get("protocol") != "rbd":
        return None
    return Path(f"{RBD_PREFIX}{source.get('name', '')}")


def _source(place: ET.Element) -> Path | None:
    source = place.find("source")
    if source is not None and (image := rbd_place(source)):
        return image
    host = place.find("source[@protocol='nbd']/host[@transport='unix']")
    if host is not None:
        name = host.get("socket")
    else:
        name = source.get("file") or source.get("dev") if source is not None else None
    return Path(name) if name else None
