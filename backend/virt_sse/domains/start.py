"""The start of a domain: provides libvirt with the disks' DEKs, and starts the stages below QEMU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.domains.deferred_starts import DeferredStarts
from virt_sse.domains.disk_sources import DiskSources
from virt_sse.domains.domain_records import new_domain_records
from virt_sse.domains.guest_preload import refuse_unsafe
from virt_sse.domains.host_encryption import HostEncryption
from virt_sse.domains.incoming import IncomingDomains, refuse_data_on_host, refuse_disk
from virt_sse.domains.keyless_images import refuse_keyless_images
from virt_sse.domains.received_disks import ReceivedDisks
from virt_sse.domains.replacement_outcome import settle_ended
from virt_sse.domains.state_records import forget_used
from virt_sse.domains.used_disks import UsedDisk, UsedDisks
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    LibvirtError,
    LibvirtSilentError,
    VirtSseError,
)
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.freshness import with_images_envelope, with_newer_envelope
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.capabilities import HostCapabilities
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import set_ceph_secret, set_secrets
from virt_sse.libvirt.users import User
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek
from virt_sse.model.layers import Placement
from virt_sse.qemu import ceph, image_file, qcow2, rbd_image, unlocking
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.stages.hand_overs import HandOvers
from virt_sse.stages.record import StageRecord
from virt_sse.system.locks import DiskLocks
from virt_sse.system.rbd_names import is_rbd

_log = logging.getLogger(__name__)

_AT_ONCE = 8
"""Number of disks served in parallel. Most of the time is spent waiting for key providers and processes."""

_RUNNING = (DiskState.READY, DiskState.COPYING, DiskState.RECEIVING)
"""The states of disks in running domains."""

_INCOMING = (DiskState.READY, DiskState.RECEIVING)
"""The states of disks in domains about to migrate to this host."""


class DomainStart(DiskSources):
    """Provides domains with the DEKs and stages of the domains' disks."""

    def __init__(self, host: Host, host_encryption: HostEncryption) -> None:
        super().__init__(host)
        self._host = host
        self._used = UsedDisks(host, self)
        self._opened_store = host.opened_store
        self._keys = host.keys
        self._freshness = host.freshness
        self._locks = host.locks
        self._leases = host.leases
        self._starting = DiskLocks(host.config.stage_directory.parent / "starts.lock")
        self._host_encryption = host_encryption
        self._deferred = DeferredStarts(host.config)
        self._hand_overs = HandOvers(self._stages)
        self._incoming = IncomingDomains(host.config)
        self._received = ReceivedDisks(host)

    def announce(self, definition: DomainDefinition) -> str:
        """Begin the migration of a running domain to this host: the definition for libvirt.

        Disks of this host that are to receive the content of the domain's disks take their places.

        :raise VirtSseError: When this host does not have a disk, or not its image.
        """
        definition = self._received.in_place(definition)
        used = self._used.look_up(definition.our_disks, definition.name, states=_INCOMING)
        received = [each.disk.id for each in used if each.disk.state is DiskState.RECEIVING]
        return self._incoming.announce(definition, received)

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
                    states = _INCOMING if is_incoming else (DiskState.READY,)
                    served = self._used.look_up(uses, definition.name, states=states)
                    if is_incoming:
                        for each in served:
                            refuse_disk(each.disk, each.plan)
                    disks = [each.disk for each in served]
                    with (
                        self._leased(definition.uuid, disks, is_incoming=is_incoming),
                        connected(self._config.libvirt_uri) as connection,
                    ):
                        self._serve(connection, definition, served, is_incoming=is_incoming)
                forget_used(self._config, definition.uuid, [use.disk_id for use in uses])
                new_domain_records(self._config).remove(definition.uuid)  # in use: nothing to be undone
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
        served = self._used.look_up(uses, definition.name, states=_RUNNING)
        disk_ids, states = [each.disk.id for each in served], (DiskState.READY, DiskState.COPYING)
        with self._leases.starting(definition.uuid, disk_ids, states=states):
            self._serve(connection, definition, served)
        forget_used(self._config, definition.uuid, disk_ids)

    def _leased(
        self, domain_id: UUID, disks: Sequence[Disk], *, is_incoming: bool
    ) -> contextlib.AbstractContextManager[None]:
        """Take the leases of a domain and its disks, or await those of a domain on another host."""
        states = [DiskState.READY]
        if not is_incoming:
            return self._leases.starting(domain_id, [each.id for each in disks], states=states)
        waiting = [each for each in disks if each.state is DiskState.RECEIVING]
        received = {each.source_id: each.id for each in waiting if each.source_id}
        shared = [each.id for each in disks if each not in waiting]
        return self._leases.awaiting(domain_id, shared, states=states, received=received)

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
        served: Sequence[UsedDisk],
        *,
        is_incoming: bool = False,
    ) -> None:
        domain_id, name = definition.uuid, definition.name
        qemu = None
        before: dict[UUID, UUID | None] = {}
        if any(self.source_of(each.disk, each.plan).behind for each in served):
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
            found = {key: dek for each in starting for key, dek in each.result().items()}
            self._set_ceph_secret(connection, served)
            set_secrets(connection, found)
            undo.pop_all()

    def _set_ceph_secret(self, connection: libvirt.virConnect, served: Sequence[UsedDisk]) -> None:
        """Give libvirt the key of the Ceph user, if the guest's QEMU itself opens an RBD image."""
        for each in served:
            source = self.source_of(each.disk, each.plan)
            if source.cluster and not source.behind:
                set_ceph_secret(connection, source.cluster.secret_usage, ceph.user_key())
                return

    def restore(self, definition: DomainDefinition) -> None:
        """Give libvirt the DEKs of a running domain and of the domain's disks again. Stages stay untouched.

        The incomplete image of a copy under way is left out: QEMU has the image open, and needs no secret.
        The definition counts: a disk's present placement applies from the domain's next start.

        :raise VirtSseError: When a DEK cannot be unwrapped; libvirt then gets no DEK of the disks.
        """
        self._host_encryption.restore(definition)
        deks: dict[SecretName, Dek] = {}
        in_use: list[UsedDisk] = []
        uses = [use for use in self._used.complete(definition.our_disks) if use.secret]
        for stored in self._used.look_up(uses, definition.name, placement=Placement.GUEST, states=_RUNNING):
            each = replace(stored, disk=self._with_images_envelope(stored.disk))
            deks |= each.for_libvirt(self._unlock(each, definition.name))
            in_use.append(each)
        with connected(self._config.libvirt_uri) as connection:
            self._set_ceph_secret(connection, in_use)
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
        deks: dict[str, Dek] = {}
        if self._stages.dek_slots(record):
            disk, deks = self._deks_of(record)
            self._validate_inner(disk, deks)
        self._stages.restart(record.disk_id, deks)

    def leave_disk(self, record: StageRecord) -> bool:
        """Begin to hand a disk over to the host to which its guest migrates; see :meth:`HandOvers.leave`.

        :return: whether nothing is left to do: this host does not have the image open. Otherwise call again.
        :raise VirtSseError: When the hand-over cannot begin; the class tells the cause.
        """
        if self._leases.awaits(record.domain_id) or self._hand_overs.is_held(record):
            return True
        if not self._hand_overs.is_pending(record):
            _, deks = self._deks_of(record)
            self._hand_overs.leave(record.disk_id, deks)
        return False

    def _deks_of(self, record: StageRecord) -> tuple[Disk, dict[str, Dek]]:
        """The disk of running stage processes, and their DEKs by slot."""
        disk = self._with_images_envelope(self._store.get(str(record.disk_id)))
        with audit_context(domain=record.domain):
            return disk, {slot: self._keys.unwrap_slot(disk, slot) for slot in self._stages.dek_slots(record)}

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
        served: UsedDisk,
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
            is_elsewhere = is_incoming and served.disk.state is not DiskState.RECEIVING
            if is_rbd(served.disk.path):
                _refuse_shared(served.disk.path, is_incoming=is_elsewhere)
            served = self._begin_use(served, is_elsewhere=is_elsewhere)
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
                    is_elsewhere=is_elsewhere,
                )
            return served.for_libvirt(deks)

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

    def _begin_use(self, served: UsedDisk, *, is_elsewhere: bool) -> UsedDisk:
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

    def _unlock(self, served: UsedDisk, domain: str) -> dict[str, Dek]:
        """Unwrap the disk's DEKs; by slot."""
        with audit_context(domain=domain):
            unwrapped = self._keys.unwrap_all(served.disk)
        return {entry.slot: dek for entry, dek in zip(served.disk.deks, unwrapped, strict=True)}


def _refuse_shared(path: Path, *, is_incoming: bool) -> None:
    """Refuse an RBD image that another client has open; QEMU locks files only.

    :raise DiskInUseError: When a client has the image open, unless the domain is about to migrate here.
    :raise ImageError: When the image lacks the exclusive lock.
    """
    rbd_image.refuse_without_lock(path)
    if not is_incoming:
        image_file.refuse_if_open(path)


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
