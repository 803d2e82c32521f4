"""Image chains of a domain's disks: overlays, backing files, mirrors and backups.

Sources: libvirt formatdomain, formatbackup.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.disk_element import drop_malformed_names, plain_disk, rbd_place, secret_name, target_of
from virt_sse.libvirt.xml import parse_xml


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One image of a disk.

    :ivar place: the location for messages; a path for a file.
    :ivar path: the file, block device, RBD image, or Unix socket of an NBD server; ``None`` for any other
        location.
    :ivar is_file: whether :attr:`path` is a file.
    :ivar is_device: whether :attr:`path` is a block device or an RBD image.
    :ivar volume: name of the storage pool, and name of the volume in the pool, instead of a path.
    :ivar index: libvirt's number of the image in a running domain.
    :ivar disk_id: id of the disk of ours whose secret encrypts the image, or whose plaintext is exported.
    :ivar slot: the DEK's slot; ``None`` for such an export.
    """

    place: str
    path: Path | None = None
    is_file: bool = False
    is_device: bool = False
    volume: tuple[str, str] | None = None
    index: str | None = None
    is_encrypted: bool = False
    disk_id: UUID | None = None
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class DiskChain:
    """A disk of a domain with all its images.

    :ivar target: the disk's name in the guest, e.g. ``vda``.
    :ivar alias: libvirt's name of the device in QEMU.
    :ivar read_only: whether the guest cannot write to the disk.
    :ivar transient: whether libvirt puts an unencrypted overlay over the disk at each start.
    :ivar links: from the image that the guest writes to down to the last backing file.
    :ivar mirror: target of a running copy.
    :ivar mirror_job: libvirt's name of the copy job.
    :ivar mirror_ready: whether the copy has caught up.
    :ivar backup: targets of a running backup.
    """

    target: str
    alias: str = ""
    serial: str = ""
    read_only: bool = False
    transient: bool = False
    links: tuple[ChainLink, ...] = ()
    mirror: tuple[ChainLink, ...] = ()
    mirror_job: str | None = None
    mirror_ready: bool = False
    backup: tuple[ChainLink, ...] = ()

    @property
    def ours(self) -> int | None:
        """Position in :attr:`links` of the first disk of ours."""
        return next((number for number, link in enumerate(self.links) if link.disk_id), None)

    @property
    def written_as_plain(self) -> tuple[ChainLink, ...]:
        """Files, block devices, RBD images and volumes to which QEMU may write without encryption.

        Backing files too: a commit writes to a backing file.
        """
        links = (*(() if self.read_only else self.links), *self.mirror, *self.backup)
        return tuple(
            link
            for link in links
            if not link.is_encrypted
            and link.disk_id is None
            and (link.is_file or link.is_device or link.volume)
        )

    @property
    def disk_id(self) -> UUID | None:
        """Id of the first disk of ours in :attr:`links`."""
        return self.links[self.ours].disk_id if self.ours is not None else None


class BackupJob:
    """A running backup of a domain."""

    def __init__(self, root: ET.Element) -> None:
        self._root = root

    @classmethod
    def parse(cls, xml: str) -> Self:
        """Read libvirt's description of a backup.

        :raise InvalidValueError: When *xml* is malformed.
        """
        return cls(parse_xml(xml, kind="backup XML"))

    @classmethod
    def salvage(cls, xml: str) -> tuple[Self | None, list[str]]:
        """Read as much of *xml* as can be read; raises no error.

        :return: ``None`` if nothing can be read; and what was left out.
        """
        try:
            root = parse_xml(xml, kind="backup XML")
        except InvalidValueError as exc:
            return None, [str(exc)]
        return cls(root), drop_malformed_names(root)

    def targets(self) -> dict[str, tuple[ChainLink, ...]]:
        """The images that the backup writes to, by the disk's name in the guest.

        :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
        """
        return {
            disk.get("name", ""): tuple(
                _link(disk, place) for place in (*disk.iterfind("target"), *disk.iterfind("scratch"))
            )
            for disk in self._root.iterfind("./disks/disk")
            if disk.get("backup") != "no"
        }


def disk_chains(domain: ET.Element, backup: BackupJob | None) -> list[DiskChain]:
    """The chains of all disks with a medium in the ``<domain>`` element *domain*, including CD drives.

    :raise InvalidValueError: When a secret's usage id has our prefix and is malformed.
    """
    chains = [_chain(disk) for disk in domain.iterfind("./devices/disk")]
    if backup is not None:
        targets = backup.targets()
        chains = [replace(chain, backup=targets.get(chain.target, ())) for chain in chains]
    return [chain for chain in chains if chain.links]


def _chain(disk: ET.Element) -> DiskChain:
    alias, mirror = disk.find("alias"), disk.find("mirror")
    return DiskChain(
        target=target_of(disk),
        alias=alias.get("name", "") if alias is not None else "",
        serial=disk.findtext("serial", ""),
        read_only=disk.find("readonly") is not None or disk.get("device") == "cdrom",
        transient=disk.find("transient") is not None,
        links=tuple(_links(disk)),
        mirror=tuple(_links(mirror)) if mirror is not None else (),
        mirror_job=mirror.get("job") if mirror is not None else None,
        mirror_ready=mirror is not None and mirror.get("ready") == "yes",
    )


def _links(place: ET.Element | None) -> Iterator[ChainLink]:
    while place is not None:
        source = place.find("source")
        if source is not None:
            yield _link(place, source)
        place = place.find("backingStore")


def _link(place: ET.Element, source: ET.Element) -> ChainLink:
    """Read an image.

    :param place: the element of the image.
    :param source: its child with the location: ``<source>``, or ``<target>`` or ``<scratch>`` of a backup.
    """
    secrets = [*place.iterfind("./encryption/secret"), *source.iterfind("./encryption/secret")]
    names = [found for secret in secrets if (found := secret_name(secret))]
    disk_id = names[0].owner if names else None
    if source.tag == "source" and not secrets:
        disk_id = plain_disk(source)
    encryption = place.find("./encryption") is not None or source.find("./encryption") is not None
    rbd = rbd_place(source)
    path = source.get("file") or source.get("dev") or rbd or _socket(source)
    return ChainLink(
        place=_place(source),
        path=Path(path) if path else None,
        is_file=source.get("file") is not None,
        is_device=source.get("dev") is not None or rbd is not None,
        volume=(source.get("pool", ""), source.get("volume", "")) if source.get("volume") else None,
        index=place.get("index") or source.get("index"),
        is_encrypted=encryption,
        disk_id=disk_id,
        slot=names[0].slot if names else None,
    )


def _socket(source: ET.Element) -> str | None:
    host = source.find("host[@transport='unix']")
    return host.get("socket") if host is not None else None


def _place(source: ET.Element) -> str:
    if known := source.get("file") or source.get("dev") or rbd_place(source) or _socket(source):
        return str(known)
    words = [source.get(name) for name in ("protocol", "pool", "name", "volume", "startupPolicy")]
    hosts = [host.get("name") for host in source.iterfind("host")]
    return " ".join(word for word in (*words, *hosts) if word) or "an unnamed source"
