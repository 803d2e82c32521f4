"""Hot-plug: attaches disks to running or stopped domains, and detaches disks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from uuid import UUID

import libvirt

from virt_sse.disks.inspector import Inspector
from virt_sse.domains import dirty_bitmaps
from virt_sse.domains.host_encryption import refuse_unencrypted
from virt_sse.domains.start import DomainStart
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    LibvirtError,
    LibvirtUnavailableError,
)
from virt_sse.keys.encryption_sets import refuse_moved
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_users, domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DiskSource, DomainDisk, disk_element
from virt_sse.libvirt.iothreads import IothreadChoice, choose, parse_number
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secret
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, check_kind, state_error
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import HostCaching
from virt_sse.model.operations import AttachDisk
from virt_sse.model.vms import VmProperties
from virt_sse.system.files import canonical

_UNPLUG_SECONDS = 20.0
"""Maximum time for a guest to release a disk."""

_RECONNECT_SECONDS = 10.0
_ENDING_SECONDS = 2.0
"""Maximum time for libvirt to notice the end of a domain."""


class Hotplug:
    """Attaches disks to domains, detaches and resizes disks in domains.

    Methods with a disk's name as parameter accept the id as well.
    """

    def __init__(self, host: Host, start: DomainStart, inspector: Inspector) -> None:
        self._config = host.config
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._plugins = host.plugins
        self._stages = host.stages
        self._leases = host.leases
        self._freshness = host.freshness
        self._start = start
        self._inspector = inspector

    def users(self, disk: Disk) -> list[str]:
        """List the names of the domains with the disk, running or only defined.

        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        return disk_users.names(self._uri, disk.id)

    def attach(
        self,
        name: str,
        domain_name: str,
        *,
        target: str | None = None,
        bus: DiskBus | None = None,
        read_only: bool = False,
        caching: HostCaching = HostCaching.NONE,
        iothread: int | IothreadChoice | None = None,
    ) -> str:
        """Attach a disk to a domain: in its persistent definition, and at once if the domain runs.

        If only one definition of a running domain has the disk, the disk is added to the other definition: a
        killed :meth:`attach` or :meth:`detach` leaves such a domain.

        :param target: the disk's name in the guest; default: the first free name on *bus*.
        :param bus: default: by *target*; virtio without a target. Only libvirt knows which buses of a running
            domain take new disks.
        :param caching: host caching of the disk, in a domain with encryption at host.
        :param iothread: the iothread of the domain that serves the disk; default: QEMU's main thread. A new
            iothread stays in the domain after :meth:`detach`.
        :return: the target.
        :raise DiskInUseError: When another domain has the disk, or this domain has the disk in all
            definitions, or with other options.
        :raise PolicyError: When a rule refuses; or with *caching*, if the domain has no encryption at host.
        :raise InvalidValueError: When the target is invalid, or the domain does not have the iothread.
        :raise LibvirtError: When no such domain exists, or libvirt refuses.
        """
        disk = dataclasses.replace(self._store.get(name), caching=caching)
        check_kind(disk, DiskKind.DISK)
        if disk.state is not DiskState.READY:
            raise state_error(disk)
        with connected(self._uri) as connection:
            users = {user.name() for user in disk_users.using(connection, disk.id)}
            if users - {domain_name}:
                raise DiskInUseError(f"disk {disk.name!r} is attached to domain {min(users)!r}")
            domain = domains.lookup(connection, domain_name)
            uses = {flag: disk_users.uses(domain, flag, disk.id) for flag in disk_users.definitions(domain)}
            missing = [flag for flag, found in uses.items() if not found]
            if not missing:
                raise DiskInUseError(f"disk {disk.name!r} is attached to domain {domain_name!r}")
            definition = domains.definition(domain)
            at_host = definition.has_encryption_at_host
            content = self._inspector.content(disk, domain_name)
            self._plugins.validate(AttachDisk(disk, domain_name, at_host, content))
            refuse_unencrypted(
                self._plugins, domain_name, VmProperties(at_host), (disk,), has_temp_disk=False
            )
            refuse_moved(disk, self._set_of(disk), self._config)
            source = self._start.source(disk)
            present = next((use for found in uses.values() for use in found), None)
            target = target or (present.target if present else definition.free_target(bus or DiskBus.VIRTIO))
            adds_iothread = False
            if present and isinstance(iothread, IothreadChoice):  # chosen by the attach that was killed
                iothread = parse_number(present.iothread) if present.iothread else None
            if iothread is not None:
                inactive = [flag == libvirt.VIR_DOMAIN_AFFECT_CONFIG for flag in missing]
                threads = [domains.definition(domain, inactive=each).iothreads() for each in inactive]
                iothread, adds_iothread = choose(iothread, threads)
            if present and not _is_use(
                present, source, target=target, read_only=read_only, iothread=iothread
            ):
                raise DiskInUseError(
                    f"domain {domain_name!r} has disk {disk.name!r} as {present.target} with other options",
                    hint=f"'virt-sse disk detach {disk.name} {domain_name}' removes the disk from the domain",
                )
            self._store.vms.set_caching(disk.id, caching)
            element = disk_element(
                source,
                target=target,
                bus=bus,
                read_only=read_only,
                iothread=iothread,
                options=self._start.driver_options(disk),
            )
            with contextlib.ExitStack() as undo:
                if libvirt.VIR_DOMAIN_AFFECT_LIVE in missing:
                    undo.callback(self._forget, domain, disk)
                    self._start.serve(connection, domains.definition(domain), [source.use(target)])
                if iothread is not None and adds_iothread:
                    domain.addIOThread(iothread, sum(missing))
                    undo.callback(_drop_iothread, domain, iothread, sum(missing))
                domain.attachDeviceFlags(element, sum(missing))
                undo.pop_all()
        return target

    def gains_by_acceleration(self, domain_name: str) -> bool:
        """Whether the domain's next start would encrypt faster with the XTS library installed for guests.

        :raise LibvirtError: When no such domain exists.
        """
        library = self._config.guest_library
        if not library.is_wanted or library.obstacle():
            return False
        with connected(self._uri) as connection:
            domain = domains.lookup(connection, domain_name)
            definition = domains.definition(domain, inactive=bool(domain.isPersistent()))
        uses_deks = any(use.slot for use in definition.our_disks)
        return uses_deks and not definition.loaded_code

    def _set_of(self, disk: Disk) -> EncryptionSet | None:
        return self._store.encryption_sets.get(str(disk.set_id)) if disk.set_id else None

    def detach(self, name: str, domain_name: str) -> None:
        """Detach a disk from a domain: at once if the domain runs, and from its persistent definition.

        The definition changes last: if guest or bus keep the disk, nothing changes.
        If no domain has the disk any more, secrets and stages left by a killed command are removed.

        :raise DiskNotFoundError: When the domain does not have the disk.
        :raise DiskStateError: When the disk is being copied.
        :raise LibvirtError: When libvirt refuses, or the guest does not release the disk in time.
        """
        disk = self._store.get(name)
        if disk.state is DiskState.COPYING:
            raise state_error(disk)
        with connected(self._uri) as connection:
            domain = domains.lookup(connection, domain_name)
            found = [
                (flag, use)
                for flag in disk_users.definitions(domain)
                for use in disk_users.uses(domain, flag, disk.id)
            ]
            if not found:
                if not disk_users.using(connection, disk.id):
                    self._forget(domain, disk)
                raise DiskNotFoundError(f"domain {domain_name!r} does not have disk {disk.name!r}")
            # The live domain first.
            for flag, use in sorted(found, key=lambda each: each[0] != libvirt.VIR_DOMAIN_AFFECT_LIVE):
                with _ending_is_fine(domain, flag):
                    # libvirt finds the disk by its target. The disk's present source may be another.
                    source = DiskSource(disk.id, use.slot, disk.format.value, disk.path)
                    element = disk_element(source, target=use.target, read_only=False)
                    domain.detachDeviceFlags(element, flag)
                    if flag == libvirt.VIR_DOMAIN_AFFECT_LIVE:
                        self._await_unplug(domain, disk)
            self._forget(domain, disk)
        self._freshness.end_use(disk.id, disk.path)
        self._store.vms.set_caching(disk.id, HostCaching.NONE)

    def _forget(self, domain: libvirt.virDomain, disk: Disk) -> None:
        """Remove the secrets and stages provided to a domain for the disk, and give the lease back."""
        domain_id = UUID(domain.UUIDString())
        for entry in disk.deks:
            drop_secret(domain.connect(), SecretName(disk.id, entry.slot))
        self._stages.stop(disk.id, domain_id=domain_id)
        self._leases.end(domain_id, [disk.id])

    def _await_unplug(self, domain: libvirt.virDomain, disk: Disk) -> None:
        """Wait until the guest releases the disk: unplugging needs the cooperation of a running guest."""
        deadline = time.monotonic() + _UNPLUG_SECONDS
        while domains.is_active(domain) and disk_users.uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk.id):
            if time.monotonic() > deadline:
                raise LibvirtError(
                    f"the guest in domain {domain.name()!r} did not release disk {disk.name!r} "
                    f"within {_UNPLUG_SECONDS:g} s",
                    hint="libvirt removes the disk as soon as the guest releases it; then detach it again, "
                    "which changes the persistent definition",
                )
            time.sleep(0.1)

    def live_size(self, disk: Disk) -> int | None:
        """The size that the running domain with the disk has, in bytes; ``None`` without such a domain.

        :raise LibvirtError: When libvirt refuses.
        """
        with contextlib.suppress(LibvirtUnavailableError), connected(self._uri) as connection:
            for domain in disk_users.using(connection, disk.id):
                with domains.gone_is_fine(or_ended=True):
                    for use in disk_users.uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk.id):
                        if domain.isActive():
                            return int(domain.blockInfo(use.target)[0])
        return None

    def resize_live(self, disk: Disk, size: int) -> bool:
        """Resize the disk in the running domain with the disk.

        :return: whether a running domain has the disk.
        :raise StageError: When a stage below the domain's QEMU cannot grow while in use.
        :raise LibvirtError: When libvirt refuses.
        :raise MonitorError: When a smaller disk is asked for and QEMU does not answer.
        """
        try:
            with connected(self._uri) as connection:
                for domain in disk_users.using(connection, disk.id):
                    if domain.isActive():
                        (use, *_) = disk_users.uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk.id)
                        if size < disk.size:  # bitmaps forget what is cut off, and the disk may grow again
                            dirty_bitmaps.forget(domain, disk.id)
                        self._stages.grow(disk, size, reconnects=use.reconnects)
                        _block_resize(domain, use.target, size)
                        return True
        except LibvirtUnavailableError:
            pass  # QEMU's lock on the image shows whether a domain uses the disk
        return False


def _drop_iothread(domain: libvirt.virDomain, iothread: int, flags: int) -> None:
    """Remove an iothread after a failure; the domain may have ended, and libvirt restarted."""
    with contextlib.suppress(libvirt.libvirtError):
        domain.delIOThread(iothread, flags)


def _is_use(
    present: DomainDisk, source: DiskSource, *, target: str, read_only: bool, iothread: int | None
) -> bool:
    """Whether a domain has the disk just as :meth:`Hotplug.attach` would attach the disk."""
    place = present.source and canonical(present.source)
    number = None if iothread is None else str(iothread)
    has = (place, present.target, present.read_only, present.iothread)
    return has == (source.place, target, read_only, number)


def _block_resize(domain: libvirt.virDomain, target: str, size: int) -> None:
    """Resize a disk in a running domain. Retries while QEMU reconnects to the stage below."""
    deadline = time.monotonic() + _RECONNECT_SECONDS
    while True:
        try:
            domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            return
        except libvirt.libvirtError as exc:
            if "NBD" not in str(exc) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def _ending_is_fine(domain: libvirt.virDomain, definition: int) -> Iterator[None]:
    """Ignore errors of a live detach if the domain ends meanwhile: an ended domain has no disk."""
    try:
        yield
    except libvirt.libvirtError:
        # libvirt reports the loss of QEMU's monitor to the caller before noticing the end of the domain.
        deadline = time.monotonic() + _ENDING_SECONDS
        while definition == libvirt.VIR_DOMAIN_AFFECT_LIVE and time.monotonic() < deadline:
            if not domains.is_active(domain):
                return
            time.sleep(0.05)
        raise
