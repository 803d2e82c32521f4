"""Images without encryption in the chains of encrypted disks, as far as libvirt knows the chains."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from virt_sse.libvirt.disk_chains import BackupJob, ChainLink, DiskChain
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import SERIAL_LENGTH
from virt_sse.system.files import canonical

_SERIAL = re.compile(rf"<serial>[0-9a-f]{{{SERIAL_LENGTH}}}</serial>")

ACTIVE_COMMIT = "active-commit"
"""libvirt's job that commits the top image into its backing file; the job copies to no other image."""


class LinkKind(enum.Enum):
    """Relation of an unencrypted image to the encrypted disk whose data the image holds."""

    OVERLAY = "overlay"
    BACKING = "backing file"
    MIRROR = "mirror"
    BACKUP = "backup"
    SUBSTITUTE = "image in its place"
    KEYLESS = "keyless image"
    """The disk's own image, used as a plain disk."""


@dataclass(frozen=True, slots=True)
class PlaintextLink:
    """An image without encryption that holds, or will hold, data of a disk of ours."""

    disk_id: UUID
    target: str
    kind: LinkKind
    place: str

    def __str__(self) -> str:
        return f"{self.target}: {self.kind.value} {self.place}"


def plaintext_links(
    definition: DomainDefinition,
    backup: BackupJob | None = None,
    *,
    known: Mapping[str, UUID] | None = None,
    guest_socket: Callable[[UUID], Path],
) -> list[PlaintextLink]:
    """The images without encryption that libvirt reads or writes data of our disks from or to.

    The NBD export of a disk that is decrypted below the guest's QEMU is no such image: data is plaintext on
    its socket, and nowhere at rest.

    :param definition: the live definition of a running domain.
    :param backup: a running backup of the domain.
    :param known: our disks by serial number, to recognize a disk whose image another image has replaced.
    :param guest_socket: the socket at which a guest's QEMU finds a disk: an export's name proves nothing.
    :raise InvalidValueError: When a name has our prefix and is malformed.
    """

    def is_plain(link: ChainLink) -> bool:
        if link.is_encrypted:
            return False
        socket = None if link.is_file or link.is_device else link.path
        return (
            link.disk_id is None
            or socket is None
            or canonical(socket) != canonical(guest_socket(link.disk_id))
        )

    found: list[PlaintextLink] = []
    for chain in definition.disk_chains(backup):
        position, disk_id = chain.ours, chain.disk_id
        if position is None or disk_id is None:
            found += _substitutes(chain, known or {})
            continue
        for number, link in enumerate(chain.links):
            if is_plain(link):
                kind = LinkKind.OVERLAY if number < position else LinkKind.BACKING
                if number == position:
                    kind = LinkKind.SUBSTITUTE
                found.append(PlaintextLink(disk_id, chain.target, kind, link.place))
        if chain.transient and position == 0:
            found.append(PlaintextLink(disk_id, chain.target, LinkKind.OVERLAY, "of <transient/>"))
        if chain.mirror_job != ACTIVE_COMMIT:
            found += [
                PlaintextLink(disk_id, chain.target, LinkKind.MIRROR, link.place)
                for link in chain.mirror
                if is_plain(link)
            ]
        found += [
            PlaintextLink(disk_id, chain.target, LinkKind.BACKUP, link.place)
            for link in chain.backup
            if is_plain(link)
        ]
    return found


def may_be_ours(xml: str) -> bool:
    """Whether domain XML has a serial number like our disks'. Searches the text without parsing."""
    return _SERIAL.search(xml) is not None


def _substitutes(chain: DiskChain, known: Mapping[str, UUID]) -> list[PlaintextLink]:
    top, disk_id = chain.links[0], known.get(chain.serial)
    if disk_id is None or top.is_encrypted:
        return []
    return [PlaintextLink(disk_id, chain.target, LinkKind.SUBSTITUTE, top.place)]
