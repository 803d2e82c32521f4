"""The start of a domain: provides libvirt with the disks' DEKs, and starts the stages below QEMU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from uuid import UUID

import libvirt

from virt_sse.config import IoErrors
from virt_sse.domains.deferred_starts import DeferredStarts
from virt_sse.domains.guest_preload import refuse_unsafe
from virt_sse.domains.host_encryption import HostEncryption
from virt_sse.domains.incoming import IncomingDomains, refuse_data_on_host, refuse_disk
from virt_sse.domains.keyless_images import refuse_keyless_images
from virt_sse.domains.replacement_outcome import settle_ended
from virt_sse.domains.state_records import forget_used
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    EnvelopeError,
    ImageError,
    InvalidValueError,
    LibvirtError,
    LibvirtSilentError,
    PolicyError,
    VirtSseError,
)
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.freshness import with_images_envelope, with_newer_envelope
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_element, domains
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import Behind, DiskSource, DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import set_secrets
from virt_sse.libvirt.users import User
from virt_sse.model.cloud import DriverOptions
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, check_kind
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek
from virt_sse.model.layers import GuestNode, LayerChoice, LayerPlan, Placement
from virt_sse.model.operations import UnlockDisk
from virt_sse.qemu import envelope_slots, image_file, qcow2, unlocking
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.stages.record import StageRecord
from virt_sse.system.block_devices import is_device
from virt_sse.system.files import canonical
from virt_sse.system.locks import DiskLocks

_log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Number of disks served in parallel. Most of the time is spent waiting for key providers and processes."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A disk to serve to a domain, with the uses of the disk in the domain's definition."""

    disk: Disk
    plan: LayerPlan
    uses: tuple[DomainDisk, ...]


class DomainStart:
    """Provides domains with the DEKs and stages of the domains' disks."""

    def __init__(self, host: Host, host_encryption: HostEncryption) -> None:
        self._host = host
        self._config = host.config
        self._store = host.store_reads
        self._opened_store = host.opened_store
        self._plugins = host.plugins
        self._keys = host.keys
        self._freshness = host.freshness
        self._locks = host.locks
        self._leases = host.leases
        self._stages = host.stages
        self._starting = DiskLocks(host.config.stage_directory.parent / "starts.lock")
        self._host_encryption = host_encryption
        self._deferred = DeferredStarts(host.config)
        self._incoming = IncomingDomains(host.config)

    def announce(self, definition: DomainDefinition) -> str:
        """Begin the migration of a running domain to this host: the definition for libvirt.

        :raise VirtSseError: When this host does not have a disk, or not its image.
        """
        self._look_up(definition.our_disks, definition.name)
        return self._incoming.announce(definition)

    def prepare(self, definition: DomainDefinition) -> None:
        """Serve all disks, the temporary disk and the TPM's DEK to a domain about to be started, or nothing.

        Likewise to a domain about to migrate here, unless something of the domain cannot migrate.

        A domain refused because libvirt does not answer is noted in :class:`DeferredStarts`.

        :raise VirtSseError: When any part cannot be served; the domain must not start then.
        """
        refuse_unsafe(self._config.guest_library, definition)
        refuse_keyless_images(self._host, definition)
        if is_incoming := self._incoming.claim(definition):
            refuse_data_on_host(definition)
        try:
            with self._host_encryption.prepared(definition):
                if uses := definition.our_disks:
                    if not is_incoming:
                        self._end_copies(definition)
                    served = self._look_up(uses, definition.name)
                    if is_incoming:
                        for each in served:
                            refuse_disk(each.disk, self._source(each.disk, each.plan))
                    disk_ids = [each.disk.id for each in served]
                    leased = self._leases.awaiting if is_incoming else self._leases.starting
                    with (
                        leased(definition.uuid, disk_ids, states=[DiskState.READY]),
                        connected(self._config.libvirt_uri) as connection,
                    ):
                        self._serve(connection, definition, served, is_incoming=is_incoming)
                forget_used(self._config, definition.uuid, [use.disk_id for use in uses])
        except LibvirtSilentError:
            if not is_incoming:
                self._deferred.add(definition.uuid)
            raise

    def serve(
        self, connection: libvirt.virConnect, definition: DomainDefinition, uses: Sequence[DomainDisk]
    ) -> None:
        """Serve the disks in *uses* to a domain, all or none: start their stages, then set libvirt's secrets.

        :param definition: the live definition of the domain; may be without the disks.
        :raise VirtSseError: When a disk cannot be served.
        """
        refuse_unsafe(self._config.guest_library, definition)
        served = self._look_up(uses, definition.name, is_running=True)
        disk_ids, states = [each.disk.id for each in served], (DiskState.READY, DiskState.COPYING)
        with self._leases.starting(definition.uuid, disk_ids, states=states):
            self._serve(connection, definition, served)
        forget_used(self._config, definition.uuid, disk_ids)

    def _end_copies(self, definition: DomainDefinition) -> None:
        """Settle the copies of disks under a domain that has ended, before the domain starts again.

        Without libvirt, which waits for the hook. The definition tells whether the domain had the new disk.

        :raise DiskInUseError: When another process is at work on a copy.
        """
        for use in definition.our_disks:
            with contextlib.suppress(DiskNotFoundError):
                disk = self._store.get(str(use.disk_id))
                if disk.state is DiskState.COPYING:
                    settle_ended(self._opened_store.full(), self._locks, definition)
                    return

    def _serve(
        self,
        connection: libvirt.virConnect,
        definition: DomainDefinition,
        served: Sequence[_Served],
        *,
        is_incoming: bool = False,
    ) -> None:
        domain_id, name = definition.uuid, definition.name
        qemu = None
        before: dict[UUID, UUID | None] = {}
        if any(self._source(each.disk, each.plan).behind for each in served):
            for each in served:
                before[each.disk.id] = self._ended_user(connection, each.disk, domain_id)
            qemu = definition.qemu_user or HostCapabilities.of(connection).qemu_user
        with contextlib.ExitStack() as undo:
            for each in served:
                undo.callback(self._stages.stop, each.disk.id, domain_id=domain_id)
            with ThreadPoolExecutor(_AT_ONCE, "serve") as pool:  # every start ends before the undo
                starting = [
                    pool.submit(
                        self._start, each, name, domain_id, qemu, before.get(each.disk.id), is_incoming
                    )
                    for each in served
                ]
            set_secrets(connection, {key: dek for each in starting for key, dek in each.result().items()})
            undo.pop_all()

    def restore(self, definition: DomainDefinition) -> None:
        """Give libvirt the DEKs of a running domain and of the domain's disks again. Stages stay untouched.

        The incomplete image of a copy under way is left out: QEMU has the image open, and needs no secret.
        The definition counts: a disk's present placement applies from the domain's next start.

        :raise VirtSseError: When a DEK cannot be unwrapped; libvirt then gets no DEK of the disks.
        """
        self._host_encryption.restore(definition)
        deks: dict[SecretName, Dek] = {}
        uses = [use for use in self._complete(definition.our_disks) if use.secret]
        for stored in self._look_up(uses, definition.name, placement=Placement.GUEST, is_running=True):
            each = replace(stored, disk=self._with_images_envelope(stored.disk))
            deks |= _for_libvirt(each, self._unlock(each, definition.name))
        with connected(self._config.libvirt_uri) as connection:
            set_secrets(connection, deks)

    def reconnect(self, definition: DomainDefinition) -> None:
        """Give a restarted libvirtd the DEKs of a running domain again; see :meth:`restore`.

        Raises nothing: libvirt kills the guest if its ``reconnect`` hook fails.
        """
        try:
            self.restore(definition)
        except VirtSseError as exc:
            _log.warning("cannot restore the secrets of domain %s: %s", definition.name, exc)

    def restart_stages(self, record: StageRecord) -> None:
        """Restart the dead stage processes of a disk below a running guest.

        :raise StageError: When the guest might read older data than data reported as written.
        :raise VirtSseError: When a process does not start; the class tells the cause.
        """
        deks = {}
        if slots := self._stages.dek_slots(record):
            disk = self._with_images_envelope(self._store.get(str(record.disk_id)))
            with audit_context(domain=record.domain):
                deks = {slot: self._keys.unwrap_slot(disk, slot) for slot in slots}
            self._validate_inner(disk, deks)
        self._stages.restart(record.disk_id, deks)

    def placement(self, disk: Disk) -> Placement:
        """The placement of the disk's DEKs from the next start of a domain with the disk.

        The set and the configuration decide. Of a linked clone's image, shared with other guests, the guest's
        QEMU gets no DEK, and not the file.
        """
        return disk.placement or self._config.placement

    def source(self, disk: Disk, placement: Placement | None = None) -> DiskSource:
        """Describe the disk's source for a domain definition.

        :param placement: default: see :meth:`placement`.
        :raise PolicyError: When the disk's caching and placement exclude each other.
        """
        return self._source(disk, self.plan(disk, placement))

    def disk_element(
        self,
        name: str,
        *,
        target: str | None = None,
        bus: DiskBus | None = None,
        read_only: bool = False,
        iothread: int | None = None,
    ) -> str:
        """Make the ``<disk>`` element for a disk, given by name or id (libvirt formatdomain).

        :param target: the name in the guest; default: the first name on *bus*.
        :param bus: default: by *target*; virtio without a target.
        :raise DiskNotFoundError: When the store has no such disk.
        :raise InvalidValueError: When *target* is not a valid name of a disk in a guest, or the bus has no
            iothreads for disks.
        """
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        return disk_element.disk_element(
            self.source(disk),
            target=target or f"{(bus or DiskBus.VIRTIO).prefix}a",
            bus=bus,
            read_only=read_only,
            iothread=iothread,
            options=self.driver_options(disk),
        )

    def driver_options(self, disk: Disk) -> DriverOptions | None:
        """The driver options of the disk's SKU, by the cloud profile.

        :raise PolicyError: When the profile cannot be read.
        """
        return self._plugins.cloud_profile().drivers.get(disk.sku)

    def _source(self, disk: Disk, plan: LayerPlan) -> DiskSource:
        guest, *below = plan.stages
        slot = guest.slot if isinstance(guest, GuestNode) else None
        behind = None
        if below or slot is None:
            socket = self._stages.guest_socket(disk.id)
            behind = Behind(canonical(socket), self._config.reconnect_seconds)
        policy = "stop" if self._config.io_errors is IoErrors.PAUSE else "report"
        return DiskSource(
            disk_id=disk.id,
            slot=slot,
            serial=disk.guest_serial,
            driver_type="raw" if slot is None else disk.format.value,
            path=disk.path,
            behind=behind,
            error_policy=policy if behind else None,
            is_device=is_device(disk.path),
        )

    def plan(self, disk: Disk, placement: Placement | None = None) -> LayerPlan:
        """Plan the layers and stages between guest and storage for the disk.

        :param placement: default: see :meth:`placement`.
        :raise PolicyError: When the disk's caching or its layer, from a plugin, excludes the placement.
        """
        layer = self._plugins.encryption_layer(disk.encryption_type)
        placement = placement or self.placement(disk)
        plan = layer.plan(LayerChoice(disk.key, disk.deks[-1].cipher, placement, disk.deks[0].cipher))
        in_guest = any(isinstance(stage, GuestNode) for stage in plan.stages)
        if in_guest is not (placement is Placement.GUEST):
            raise PolicyError(f"encryption layer {layer.name!r} has no placement {placement.value}")
        return self._plugins.host_layer().cache(plan, disk.caching)

    def _complete(self, uses: Sequence[DomainDisk]) -> list[DomainDisk]:
        """Leave out the uses of incomplete disks."""
        found = self._store.with_ids({use.disk_id for use in uses})
        incomplete = {disk.id for disk in found if disk.state is DiskState.CREATING}
        return [use for use in uses if use.disk_id not in incomplete]

    def _look_up(
        self,
        uses: Sequence[DomainDisk],
        domain: str,
        *,
        placement: Placement | None = None,
        is_running: bool = False,
    ) -> list[_Served]:
        """Find the disks used by a domain, and check source, slot and image of each disk.

        :param placement: as for :meth:`plan`.
        :param is_running: whether the domain runs: its disks may then be source and target of a copy.
        :raise VirtSseError: When a disk is unknown or not ready, or a check fails.
        """
        by_disk: dict[UUID, list[DomainDisk]] = {}
        for use in uses:
            by_disk.setdefault(use.disk_id, []).append(use)
        found = []
        for of_disk in by_disk.values():
            disk = self._disk_of(of_disk[0], is_running=is_running)
            served = _Served(disk, self.plan(disk, placement), tuple(of_disk))
            for use in of_disk:
                self._check_use(use, served, domain)
            self._plugins.validate(UnlockDisk(disk, domain))
            found.append(served)
        return found

    def _disk_of(self, use: DomainDisk, *, is_running: bool) -> Disk:
        try:
            disk = self._store.get(str(use.disk_id))
        except DiskNotFoundError as exc:
            raise DiskNotFoundError(
                f"{use.target} names disk {use.disk_id}, which the store does not have",
                hint="if the image is intact, 'virt-sse disk adopt PATH' adds the disk to the store",
            ) from exc
        check_kind(disk, DiskKind.DISK)
        if disk.state is not DiskState.READY and not (is_running and disk.state is DiskState.COPYING):
            raise DiskStateError(f"disk {disk.name!r} is {disk.state.value}")
        with image_file.opened(disk.path) as descriptor:
            try:
                carried = envelope_slots.read(descriptor, disk.format).disk_id
            except EnvelopeError:
                carried = disk.id  # damaged; the store has the wrapped DEKs, and QEMU needs no envelope
        if carried != disk.id:
            raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
        return disk

    def _check_use(self, use: DomainDisk, served: _Served, domain: str) -> None:
        disk, source = served.disk, self._source(served.disk, served.plan)
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

    def _ended_user(self, connection: libvirt.virConnect, disk: Disk, domain_id: UUID) -> UUID | None:
        """Find an ended domain with stages of the disk, other than the domain *domain_id*.

        :return: the id of the ended domain; ``None`` without such stages.
        :raise DiskInUseError: When the domain with the stages runs.
        :raise LibvirtError: When libvirt does not say whether the domain runs.
        """
        record = self._stages.record(disk.id)
        if record is None or record.domain_id == domain_id:
            return None
        try:
            is_running = domains.runs(connection, record.domain_id)
        except libvirt.libvirtError as exc:
            raise LibvirtError(f"cannot see whether domain {record.domain!r} has ended: {exc}") from exc
        if is_running:
            raise DiskInUseError(f"disk {disk.name!r} is in use by domain {record.domain!r}")
        return record.domain_id

    def _start(
        self,
        served: _Served,
        domain: str,
        domain_id: UUID,
        qemu: User | None,
        replacing: UUID | None,
        is_incoming: bool,
    ) -> dict[SecretName, Dek]:
        """Start the disk's stages.

        One start at a time: the validation of a second start would have the image open when the stages of the
        first begin, and both starts would be refused.

        :return: the DEKs for libvirt, by secret name.
        """
        with self._starting.hold(served.disk.id, wait=True):
            served = self._begin_use(served, is_elsewhere=is_incoming)
            return self._start_alone(served, domain, domain_id, qemu, replacing)

    def _start_alone(
        self, served: _Served, domain: str, domain_id: UUID, qemu: User | None, replacing: UUID | None
    ) -> dict[SecretName, Dek]:
        deks = self._unlock(served, domain)
        headers = self._validate_inner(served.disk, deks)
        _make_room(served.disk, deks, headers)
        with audit_context(domain=domain):
            base = unlocked_base(self._host, served.disk)
        if qemu:
            self._stages.start(
                served.disk,
                served.plan,
                deks,
                domain_id=domain_id,
                domain=domain,
                qemu=qemu,
                replacing=replacing,
                base=base,
            )
        return _for_libvirt(served, deks)

    def _validate_inner(self, disk: Disk, deks: Mapping[str, Dek]) -> Sequence[VolumeHeader]:
        """Validate the headers of nested volumes, before QEMU opens the inner volume.

        :param deks: by slot. Does nothing unless they are the DEKs of several volumes, all of the disk's: the
            outer header is validated wherever the image is opened.
        :return: the headers, innermost first; empty if nothing was done.
        :raise ImageFormatError: When a header is refused.
        :raise StaleImageError: When the inner header was changed, and policy refuses.
        """
        if 1 < len(deks) == len(disk.deks):
            outer = [deks[entry.slot] for entry in disk.deks[1:]]
            headers = unlocking.validate(disk.path, disk.format, outer)
            self._freshness.check_inner(disk, headers)
            return headers
        return ()

    def _begin_use(self, served: _Served, *, is_elsewhere: bool) -> _Served:
        """Refuse a stale image, and take over an envelope that is newer than the store's.

        :param is_elsewhere: whether the image is in use on another host, which counts the use.
        :raise StaleImageError: When the image is not the last known or a newer one, and policy refuses.
        """
        carried = self._freshness.begin_use(served.disk, is_elsewhere=is_elsewhere)
        if carried is None:
            return served
        return replace(served, disk=with_newer_envelope(self._opened_store, served.disk, carried))

    def _with_images_envelope(self, disk: Disk) -> Disk:
        return with_images_envelope(self._freshness, self._opened_store, disk)

    def _unlock(self, served: _Served, domain: str) -> dict[str, Dek]:
        """Unwrap the disk's DEKs; by slot."""
        with audit_context(domain=domain):
            unwrapped = self._keys.unwrap_all(served.disk)
        return {entry.slot: dek for entry, dek in zip(served.disk.deks, unwrapped, strict=True)}


def _make_room(disk: Disk, deks: Mapping[str, Dek], headers: Sequence[VolumeHeader]) -> None:
    """Grow the volume around a qcow2 volume that another program has grown, e.g. ``virsh blockresize``.

    :param headers: of two nested volumes, innermost first; without, nothing is done.
    :raise DiskInUseError: When a QEMU process has the image open.
    """
    for entry, inner, outer in zip(disk.deks[1:], headers, headers[1:], strict=False):
        if inner.size and outer.size and qcow2.full_room(inner.size) > outer.size:
            from virt_sse.qemu import img  # rarely needed, and the hook imports little

            room = qcow2.most_room(inner.size)
            img.resize(disk.path, disk.format, room, [deks[entry.slot]], shrink=False)


def _for_libvirt(served: _Served, deks: Mapping[str, Dek]) -> dict[SecretName, Dek]:
    """Select the disk's DEKs used by the domain definition."""
    return {use.secret: deks[use.slot] for use in served.uses if use.secret and use.slot}
