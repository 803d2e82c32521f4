"""The disks that a domain definition uses: looked up in the store, and compared with their images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from virt_sse.domains.disk_sources import DiskSources
from virt_sse.errors import (
    DiskNotFoundError,
    EnvelopeError,
    ImageError,
    InvalidValueError,
    PolicyError,
)
from virt_sse.keys.host import Host
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, check_kind, state_error
from virt_sse.model.keys import Dek
from virt_sse.model.layers import LayerPlan, Placement
from virt_sse.model.operations import UnlockDisk
from virt_sse.qemu import envelope_slots, image_file
from virt_sse.system.files import canonical


@dataclass(frozen=True, slots=True)
class UsedDisk:
    """A disk with its uses in a domain's definition."""

    disk: Disk
    plan: LayerPlan
    uses: tuple[DomainDisk, ...]

    def for_libvirt(self, deks: Mapping[str, Dek]) -> dict[SecretName, Dek]:
        """Select those of the disk's DEKs, by slot, that the definition names."""
        return {use.secret: deks[use.slot] for use in self.uses if use.secret and use.slot}


class UsedDisks:
    """Looks up the disks in definitions."""

    def __init__(self, host: Host, sources: DiskSources) -> None:
        self._store = host.store_reads
        self._plugins = host.plugins
        self._sources = sources

    def complete(self, uses: Sequence[DomainDisk]) -> list[DomainDisk]:
        """Leave out the uses of incomplete disks."""
        found = self._store.with_ids({use.disk_id for use in uses})
        incomplete = {disk.id for disk in found if disk.state is DiskState.CREATING}
        return [use for use in uses if use.disk_id not in incomplete]

    def look_up(
        self,
        uses: Sequence[DomainDisk],
        domain: str,
        *,
        placement: Placement | None = None,
        states: Collection[DiskState] = (DiskState.READY,),
    ) -> list[UsedDisk]:
        """Find the disks used by a domain, and check source, slot and image of each disk.

        :param placement: as for :meth:`DiskSources.plan`.
        :param states: the states that the disks may have.
        :raise VirtSseError: When a disk is unknown or not ready, or a check fails.
        """
        by_disk: dict[UUID, list[DomainDisk]] = {}
        for use in uses:
            by_disk.setdefault(use.disk_id, []).append(use)
        found = []
        for of_disk in by_disk.values():
            disk = self._disk_of(of_disk[0], states)
            served = UsedDisk(disk, self._sources.plan(disk, placement), tuple(of_disk))
            for use in of_disk:
                self._check_use(use, served, domain)
            self._plugins.validate(UnlockDisk(disk, domain))
            found.append(served)
        return found

    def _disk_of(self, use: DomainDisk, states: Collection[DiskState]) -> Disk:
        try:
            disk = self._store.get(str(use.disk_id))
        except DiskNotFoundError as exc:
            raise DiskNotFoundError(
                f"{use.target} names disk {use.disk_id}, which the store does not have",
                hint="if the image is intact, 'virt-sse disk adopt PATH' adds the disk to the store",
            ) from exc
        check_kind(disk, DiskKind.DISK)
        if disk.state not in states:
            raise state_error(disk)
        with image_file.opened(disk.path) as descriptor:
            try:
                carried = envelope_slots.read(descriptor, disk.format).disk_id
            except EnvelopeError:
                carried = disk.id  # damaged; the store has the wrapped DEKs, and QEMU needs no envelope
        if carried != disk.id:
            raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
        return disk

    def _check_use(self, use: DomainDisk, served: UsedDisk, domain: str) -> None:
        disk, source = served.disk, self._sources.source_of(served.disk, served.plan)
        if use.slot is not None and all(entry.slot != use.slot for entry in disk.deks):
            raise InvalidValueError(f"disk {disk.name!r} has no DEK in slot {use.slot!r}")
        if (use.slot is None) != (source.slot is None):
            wanted = Placement.STORAGE if source.slot is None else Placement.GUEST
            raise PolicyError(
                f"disk {disk.name!r} has placement {wanted.value}, "
                f"and the definition of domain {domain!r} expects placement {use.placement.value}",
                hint=f"'virt-sse vm update {domain} --refresh-disks' changes the definition",
            )
        if use.slot != source.slot:
            raise InvalidValueError(f"the DEK in slot {use.slot!r} of disk {disk.name!r} is not for guests")
        if use.source is not None and canonical(use.source) == source.place:
            return
        if source.behind:
            raise InvalidValueError(
                f"{use.target} is disk {disk.name!r} but has the source {use.source}",
                hint=f"the disk is served at {source.place}; see 'virt-sse disk xml {disk.name}'",
            )
        if use.source is None:
            raise InvalidValueError(
                f"{use.target} names disk {disk.name!r} by a volume of a storage pool, or on a server",
                hint=f"'virt-sse disk xml {disk.name}' prints the <disk> element with the path of the image",
            )
        raise InvalidValueError(
            f"{use.target} has the key of disk {disk.name!r} but the image {use.source}",
            hint=f"the disk's image is {disk.path}; register a moved image with 'virt-sse disk adopt'",
        )
