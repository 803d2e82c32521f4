"""The disks of a domain as libvirt has them: from what the guest sees down the backing files, and what is
copied beside (libvirt formatdomain, formatbackup).
"""

from __future__ import annotations

import enum
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.references import parse_usage

# Domain XML comes from libvirtd, which is trusted; ElementTree resolves no external entities.

_SERIAL_LENGTH = 20
_SERIAL = re.compile(rf"<serial>[0-9a-f]{{{_SERIAL_LENGTH}}}</serial>")

ACTIVE_COMMIT = "active-commit"
"""The job of a mirror by which libvirt commits what is on top into what is below; it copies nowhere else."""


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One image of a disk, or what stands in its place.

    :ivar place: where it is, in words; a path where it is a file.
    :ivar path: the file, or the Unix socket of an NBD server; ``None`` when it is neither.
    :ivar is_file: whether it is a file.
    :ivar index: libvirt's number of it in a running domain.
    :ivar disk_id: of a disk of ours, by its secret.
    :ivar slot: of the DEK that the secret holds.
    """

    place: str
    path: Path | None = None
    is_file: bool = False
    index: str | None = None
    is_encrypted: bool = False
    disk_id: UUID | None = None
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class DiskChain:
    """A disk of a domain.

    :ivar target: its name in the guest, e.g. ``vda``.
    :ivar alias: libvirt's name of the device in QEMU.
    :ivar links: from what the guest writes to down to the last backing file.
    :ivar mirror: what it is being copied to.
    :ivar mirror_job: libvirt's name of the job that does so.
    :ivar mirror_ready: whether the copy has caught up.
    :ivar backup: what a backup writes its data to.
    :ivar read_only: whether the guest cannot write to it.
    """

    target: str
    alias: str = ""
    serial: str = ""
    read_only: bool = False
    links: tuple[ChainLink, ...] = ()
    mirror: tuple[ChainLink, ...] = ()
    mirror_job: str | None = None
    mirror_ready: bool = False
    backup: tuple[ChainLink, ...] = ()

    @property
    def ours(self) -> int | None:
        """The position in :attr:`links` of the first that is a disk of ours."""
        return next((number for number, link in enumerate(self.links) if link.disk_id), None)

    @property
    def disk_id(self) -> UUID | None:
        """Which disk of ours it is."""
        return self.links[self.ours].disk_id if self.ours is not None else None


class LinkKind(enum.Enum):
    """What an unencrypted image is to the encrypted disk whose data it holds."""

    OVERLAY = "overlay"
    BACKING = "backing file"
    MIRROR = "mirror"
    BACKUP = "backup"
    SUBSTITUTE = "image in its place"


@dataclass(frozen=True, slots=True)
class PlaintextLink:
    """An image without encryption that data of a disk of ours is in, or comes to be in."""

    disk_id: UUID
    target: str
    kind: LinkKind
    place: str

    def __str__(self) -> str:
        return f"{self.target}: {self.kind.value} {self.place}"


def disk_chains(xml: str, backup: str | None = None) -> list[DiskChain]:
    """The disks of the domain *xml*, CD drives included; those without a medium are left out.

    :param backup: libvirt's XML of a backup that is under way.
    :raise InvalidValueError: When the XML makes no sense, or a secret in it that is named like ours.
    """
    try:
        root = ET.fromstring(xml)  # noqa: S314 -- see above
        chains = [_chain(disk) for disk in root.iterfind("./devices/disk")]
        if backup is not None:
            chains = _with_backups(chains, ET.fromstring(backup))  # noqa: S314 -- see above
    except (ET.ParseError, ValueError) as exc:
        raise InvalidValueError(f"not a domain's XML: {exc}") from exc
    return [chain for chain in chains if chain.links]


def plaintext_links(
    xml: str, backup: str | None = None, *, known: Collection[UUID] = ()
) -> list[PlaintextLink]:
    """The images without encryption that libvirt says data of disks of ours goes to or comes from.

    :param xml: the domain's; of a running one, the live one.
    :param backup: libvirt's XML of a backup that is under way.
    :param known: disks of ours that are found by their serials, if libvirt has put something else in their
        places.
    :raise InvalidValueError: As for :func:`disk_chains`.
    """
    found: list[PlaintextLink] = []
    for chain in disk_chains(xml, backup):
        position, disk_id = chain.ours, chain.disk_id
        if position is None or disk_id is None:
            found += _substitutes(chain, known)
            continue
        for number, link in enumerate(chain.links):
            if not link.is_encrypted:
                kind = LinkKind.OVERLAY if number < position else LinkKind.BACKING
                found.append(PlaintextLink(disk_id, chain.target, kind, link.place))
        if chain.mirror_job != ACTIVE_COMMIT:
            found += [
                PlaintextLink(disk_id, chain.target, LinkKind.MIRROR, link.place)
                for link in chain.mirror
                if not link.is_encrypted
            ]
        found += [
            PlaintextLink(disk_id, chain.target, LinkKind.BACKUP, link.place)
            for link in chain.backup
            if not link.is_encrypted
        ]
    return found


def may_be_ours(xml: str) -> bool:
    """Whether a domain that has no disk of ours has one that, by its serial, may have been."""
    return _SERIAL.search(xml) is not None


def serial(disk_id: UUID) -> str:
    """What the guest knows a disk of ours by."""
    return disk_id.hex[:_SERIAL_LENGTH]


def _substitutes(chain: DiskChain, known: Collection[UUID]) -> list[PlaintextLink]:
    top = chain.links[0]
    return [
        PlaintextLink(disk_id, chain.target, LinkKind.SUBSTITUTE, top.place)
        for disk_id in known
        if chain.serial == serial(disk_id) and not top.is_encrypted
    ]


def _chain(disk: ET.Element) -> DiskChain:
    target, alias, mirror = disk.find("target"), disk.find("alias"), disk.find("mirror")
    return DiskChain(
        target=target.get("dev", "") if target is not None else "",
        alias=alias.get("name", "") if alias is not None else "",
        serial=disk.findtext("serial", ""),
        read_only=disk.find("readonly") is not None or disk.get("device") == "cdrom",
        links=tuple(_links(disk)),
        mirror=tuple(_links(mirror)) if mirror is not None else (),
        mirror_job=mirror.get("job") if mirror is not None else None,
        mirror_ready=mirror is not None and mirror.get("ready") == "yes",
    )


def _with_backups(chains: list[DiskChain], backup: ET.Element) -> list[DiskChain]:
    places: dict[str, tuple[ChainLink, ...]] = {
        disk.get("name", ""): tuple(
            _link(disk, place) for place in (*disk.iterfind("target"), *disk.iterfind("scratch"))
        )
        for disk in backup.iterfind("./disks/disk")
        if disk.get("backup") != "no"
    }
    return [replace(chain, backup=places.get(chain.target, ())) for chain in chains]


def _links(place: ET.Element | None) -> Iterator[ChainLink]:
    while place is not None:
        source = place.find("source")
        if source is not None:
            yield _link(place, source)
        place = place.find("backingStore")


def _link(place: ET.Element, source: ET.Element) -> ChainLink:
    secrets = [*place.iterfind("./encryption/secret"), *source.iterfind("./encryption/secret")]
    references = [found for secret in secrets if (found := parse_usage(secret.get("usage", "")))]
    disk_id, slot = references[0] if references else (None, None)
    encryption = place.find("./encryption") is not None or source.find("./encryption") is not None
    name = source.get("file") or _socket(source)
    return ChainLink(
        place=_place(source),
        path=Path(name) if name else None,
        is_file=source.get("file") is not None,
        index=place.get("index") or source.get("index"),
        is_encrypted=encryption,
        disk_id=disk_id,
        slot=slot,
    )


def _socket(source: ET.Element) -> str | None:
    host = source.find("host[@transport='unix']")
    return host.get("socket") if host is not None else None


def _place(source: ET.Element) -> str:
    """In words, where a ``<source>``, or what is like one, is."""
    if known := source.get("file") or source.get("dev") or _socket(source):
        return known
    words = [source.get(name) for name in ("protocol", "pool", "name", "volume", "startupPolicy")]
    hosts = [host.get("name") for host in source.iterfind("host")]
    return " ".join(word for word in (*words, *hosts) if word) or "an unnamed source"
