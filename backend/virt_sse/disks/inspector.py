"""Looks for in-guest encryption on disks, and on all disks of a domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import libvirt

from virt_sse.errors import DiskStateError, ImageError, LibvirtError, PolicyError, VirtSseError
from virt_sse.in_guest.images import in_image, in_unencrypted_image
from virt_sse.keys.access import Wrapping
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_places import DiskPlace, disk_places
from virt_sse.model.content import Content, Finding
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.events import audit_context
from virt_sse.qemu import img
from virt_sse.store import Store

_FORMATS = ("raw", "qcow2")
"""Of images that are not ours."""


@dataclass(frozen=True, slots=True)
class InspectedDisk:
    """A disk of a domain that was looked at.

    :ivar target: its name in the guest.
    :ivar disk: the name of a disk of ours.
    :ivar path: where its image lies, if that is known.
    :ivar findings: what the guest has encrypted.
    :ivar problem: why it could not be looked at; then nothing is known of it.
    """

    target: str
    disk: str | None
    path: Path | None
    findings: tuple[Finding, ...]
    problem: VirtSseError | None


class Inspector:
    """Reads disks of ours with their DEKs, each use of which is in the audit log, and others as they are."""

    def __init__(self, uri: str, store: Store, wrapping: Wrapping) -> None:
        self._uri = uri
        self._store = store
        self._wrapping = wrapping

    def disk(self, disk: Disk) -> list[Finding]:
        """What the guest has encrypted on *disk*, also while a domain has it.

        :raise KeyProviderError: When its DEK cannot be had.
        :raise ImageError: When it cannot be read.
        :raise ToolError: When it does not open.
        """
        if disk.state is not DiskState.READY:
            raise DiskStateError(f"disk {disk.name!r} is {disk.state.value}")
        return in_image(disk.path, disk.format, self._wrapping.unwrap_all(disk))

    def content(self, disk: Disk, domain: str) -> Content:
        """What is on *disk*, for policies on what the domain *domain* may have."""

        def look() -> list[Finding]:
            with audit_context(domain=domain):
                return self.disk(disk)

        return Content(look)

    def domain(self, name: str) -> list[InspectedDisk]:
        """What the guest has encrypted on the disks of the domain *name*: running, defined, or both.

        :raise LibvirtError: When there is no such domain.
        """
        with connected(self._uri) as connection:
            try:
                domain = connection.lookupByName(name)
            except (libvirt.libvirtError, UnicodeEncodeError) as exc:
                raise LibvirtError(f"no domain {name!r}: {exc}") from exc
            places = [_resolved(connection, place) for place in _places(domain)]
        with audit_context(domain=name):
            return [self._inspect(place) for place in dict.fromkeys(places)]

    def in_use(self, name: str) -> list[InspectedDisk]:
        """The disks of the domain *name* on which its guest encrypts.

        :raise PolicyError: When one of its disks cannot be looked at: it may be one, too.
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
    """What a guest has encrypted on a disk that is not ours.

    One whose image draws on other files is not looked at: it can name any file there.
    """
    if place.path is None:
        raise ImageError(place.obstacle or "it has no data")
    if place.format not in _FORMATS:
        raise ImageError(f"its format is {place.format}, not {' or '.join(_FORMATS)}")
    information = img.info(place.path, place.format, shared=True)
    if information.encrypted:
        raise ImageError("it is encrypted, and not by virt-sse")
    if information.other_files:
        raise ImageError(f"it draws on another file, {information.other_files[0]}")
    return in_unencrypted_image(place.path, place.format)


def _places(domain: libvirt.virDomain) -> Iterable[DiskPlace]:
    if domain.isActive():
        yield from disk_places(domain.XMLDesc())
    if domain.isPersistent():
        yield from disk_places(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def _resolved(connection: libvirt.virConnect, place: DiskPlace) -> DiskPlace:
    """*place* with its path, if a storage pool knows it."""
    if place.volume is None:
        return place
    pool, volume = place.volume
    try:
        path = connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()
    except libvirt.libvirtError as exc:
        return DiskPlace(place.target, obstacle=f"volume {volume!r} in pool {pool!r}: {exc}")
    return DiskPlace(place.target, path=Path(path), format=place.format)
