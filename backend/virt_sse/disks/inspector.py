"""Inspection: finds in-guest encryption on a disk or on all disks of a domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import libvirt

from virt_sse.errors import ImageError, PolicyError, VirtSseError
from virt_sse.in_guest.images import in_image, in_unencrypted_chain, in_unencrypted_image
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_places import DiskPlace
from virt_sse.libvirt.pools import volume_path
from virt_sse.model.content import Content, Finding
from virt_sse.model.disks import Disk, DiskState, state_error
from virt_sse.model.events import audit_context
from virt_sse.qemu import image_file, img

_FORMATS = ("raw", "qcow2")
"""Formats of foreign images."""


@dataclass(frozen=True, slots=True)
class InspectedDisk:
    """An inspected disk of a domain.

    :ivar target: its name in the guest.
    :ivar disk: its name, if the disk is ours.
    :ivar path: its image, if known.
    :ivar findings: the volumes encrypted by the guest.
    :ivar problem: the reason for a failed inspection; *findings* is empty then.
    """

    target: str
    disk: str | None
    path: Path | None
    findings: tuple[Finding, ...]
    problem: VirtSseError | None


class Inspector:
    """Inspects our disks with their DEKs (each use is audited), and foreign disks as plain images."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._keys = host.keys

    def disk(self, disk: Disk) -> list[Finding]:
        """The volumes on *disk* encrypted by its guest; works on disks in use, too.

        :raise KeyProviderError: When the DEK cannot be unwrapped.
        :raise ImageError: When the image cannot be read.
        :raise ToolError: When the DEK does not open the image.
        """
        if disk.state is not DiskState.READY:
            raise state_error(disk)
        base = unlocked_base(self._host, disk)
        return in_image(disk.path, disk.format, self._keys.unwrap_all(disk), base=base)

    def content(self, disk: Disk, domain: str) -> Content:
        """The content of *disk*, for policies; inspected on first use, on behalf of the domain *domain*."""

        def look() -> list[Finding]:
            with audit_context(domain=domain):
                return self.disk(disk)

        return Content(look)

    def plain_content(self, path: Path, image_format: str) -> Content:
        """The content of an unencrypted image that may have a backing chain, for policies."""
        return Content(lambda: in_unencrypted_chain(path, image_format))

    def domain(self, name: str) -> list[InspectedDisk]:
        """Inspect all disks of a domain, from its live and its persistent definition.

        :raise LibvirtError: When no such domain exists.
        """
        with connected(self._uri) as connection:
            domain = domains.lookup(connection, name)
            places = [_resolved(connection, place) for place in _places(domain)]
        with audit_context(domain=name):
            return [self._inspect(place) for place in dict.fromkeys(places)]

    def in_use(self, name: str) -> list[InspectedDisk]:
        """The disks of a domain with in-guest encryption.

        :raise PolicyError: When a disk cannot be inspected, since that disk may have in-guest encryption.
        """
        inspected = self.domain(name)
        for each in inspected:
            if each.problem:
                raise PolicyError(
                    f"cannot see whether {each.target} has in-guest encryption: {each.problem}",
                    hint=each.problem.hint,
                ) from each.problem
        return [each for each in inspected if each.findings]

    def _inspect(self, place: DiskPlace) -> InspectedDisk:
        name, path = None, place.path
        try:
            if place.disk_id:
                disk = self._store.get(str(place.disk_id))
                name, path = disk.name, disk.path
                findings = self.disk(disk)
            else:
                findings = _others(place)
        except VirtSseError as exc:
            return InspectedDisk(place.target, name, path, (), exc)
        return InspectedDisk(place.target, name, path, tuple(findings), None)


def _others(place: DiskPlace) -> list[Finding]:
    """The volumes on a foreign disk encrypted by its guest.

    Images which refer to other files are refused: an image can name any file of this host.
    """
    if place.path is None:
        raise ImageError(place.obstacle or "the disk has no data")
    if place.format not in _FORMATS:
        raise ImageError(f"the image format is {place.format}, not {' or '.join(_FORMATS)}")
    with image_file.held(place.path) as descriptor:
        information = img.info(place.path, place.format, shared=True, descriptor=descriptor)
        if information.encrypted:
            raise ImageError("the image is encrypted, but not by virt-sse")
        if information.other_files:
            raise ImageError(f"the image refers to another file, {information.other_files[0]}")
        return in_unencrypted_image(place.path, place.format, descriptor=descriptor)


def _places(domain: libvirt.virDomain) -> Iterable[DiskPlace]:
    if domain.isActive():
        yield from domains.definition(domain).disk_places()
    if domain.isPersistent():
        yield from domains.definition(domain, inactive=True).disk_places()


def _resolved(connection: libvirt.virConnect, place: DiskPlace) -> DiskPlace:
    """*place* with the path of its storage volume, if any."""
    if place.volume is None:
        return place
    pool, volume = place.volume
    try:
        path = volume_path(connection, pool, volume)
    except libvirt.libvirtError as exc:
        return DiskPlace(place.target, obstacle=f"volume {volume!r} in pool {pool!r}: {exc}")
    return DiskPlace(place.target, path=path, format=place.format)
