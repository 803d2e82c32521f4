"""The plaintext disks of a domain, as libvirt describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.errors import VmStateError
from virt_sse.libvirt import domains
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.disk_places import DiskPlace
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.system.files import canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainDisk:
    """A plaintext disk of a domain.

    :ivar target: the disk's name in the guest.
    :ivar format: QEMU's name of the image's format.
    :ivar size: as seen by the guest, in bytes; 0 in a stopped domain.
    :ivar serial: serial number for the guest, if any.
    :ivar encryption_at_host: whether the domain has encryption at host.
    """

    domain_id: UUID
    is_running: bool
    target: str
    path: Path
    format: str
    size: int
    serial: str | None
    encryption_at_host: bool

    @property
    def is_file(self) -> bool:
        """Whether the image is a file."""
        return self.path.is_file()


def plain_disks(connection: libvirt.virConnect, domain: libvirt.virDomain) -> list[PlainDisk]:
    """The disks of a domain without encryption that the guest can write.

    :raise VmStateError: When such a disk is not a file or a block device of this host, or has a block job.
    :raise libvirt.libvirtError: When libvirt fails.
    """
    is_running = bool(domain.isActive())
    definition = domains.definition(domain, inactive=not is_running)
    chains = {chain.target: chain for chain in definition.disk_chains(domains.running_backup(domain))}
    found = []
    for place in definition.disk_places():
        chain = chains.get(place.target)
        if (
            place.disk_id
            or chain is None
            or chain.read_only
            or any(link.is_encrypted for link in chain.links)
        ):
            continue
        path = _path(connection, place)
        if path is None:
            raise VmStateError(f"disk {place.target} of domain {domain.name()!r}: {place.obstacle}")
        if is_running and (chain.mirror or chain.backup):
            raise VmStateError(f"disk {place.target} of domain {domain.name()!r} has a backup or a block job")
        found.append(
            PlainDisk(
                domain_id=UUID(domain.UUIDString()),
                is_running=is_running,
                target=place.target,
                path=path,
                format=place.format,
                size=int(domain.blockInfo(place.target)[0]) if is_running else 0,
                serial=chain.serial or None,
                encryption_at_host=definition.has_encryption_at_host,
            )
        )
    return found


def is_image(
    connection: libvirt.virConnect, definition: DomainDefinition, target: str, path: Path | None
) -> bool:
    """Whether the disk *target* of a definition is the image at *path*."""
    for place in definition.disk_places():
        if place.target == target and path is not None:
            found = _path(connection, place)
            return found is not None and canonical(found) == canonical(path)
    return False


def user_of_image(connection: libvirt.virConnect, path: Path) -> str | None:
    """The name of a domain with *path* in any chain of images, if any."""
    for domain in connection.listAllDomains():
        with domains.gone_is_fine():
            definitions = [domains.definition(domain), domains.definition(domain, inactive=True)]
            if any(_has(chain, path) for each in definitions for chain in each.disk_chains()):
                return str(domain.name())
    return None


def _has(chain: DiskChain, path: Path) -> bool:
    return any(
        link.path and canonical(link.path) == canonical(path) for link in (*chain.links, *chain.mirror)
    )


def _path(connection: libvirt.virConnect, place: DiskPlace) -> Path | None:
    """The path of a disk's image, also of a storage volume."""
    if place.volume is None:
        return place.path
    pool, volume = place.volume
    return Path(connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())
