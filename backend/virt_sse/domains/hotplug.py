"""Domains: bringing them the DEKs of their disks, and taking them away."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import libvirt

from virt_sse.domains.host_encryption import refuse_unencrypted
from virt_sse.domains.start import Serving
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    LibvirtError,
    LibvirtUnavailableError,
    VirtSseError,
)
from virt_sse.libvirt import domain_xml
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.secrets import drop_secret
from virt_sse.libvirt.vm_metadata import has_encryption_at_host
from virt_sse.model.content import Content
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.operations import AttachDisk
from virt_sse.model.vms import VmProperties
from virt_sse.plugins import PluginHost
from virt_sse.stages import Stages

_log = logging.getLogger(__name__)

_UNPLUG_SECONDS = 20.0
"""How long a guest may take to let go of a disk."""

_RECONNECT_SECONDS = 10.0
_ENDING_SECONDS = 2.0
"""How long libvirt may take to note that a domain has ended."""


class Domains:
    """Serves libvirt's domains at *uri*."""

    def __init__(self, uri: str, plugins: PluginHost, serving: Serving, stages: Stages) -> None:
        self._uri = uri
        self._plugins = plugins
        self._stages = stages
        self.serving = serving

    def reconnect(self, name: str, xml: str) -> None:
        """Give libvirt, which has been restarted, the DEKs of a running domain's disks again.

        Raises nothing: libvirt kills the guest of a ``reconnect`` hook that fails.
        """
        try:
            self.serving.restore(name, xml)
        except VirtSseError as exc:
            _log.warning("cannot restore the secrets of domain %s: %s", name, exc)

    def users(self, disk: Disk) -> list[str]:
        """The names of the domains, running or just defined, that have the disk.

        :raise LibvirtUnavailableError: When libvirt cannot be asked.
        """
        with connected(self._uri) as connection:
            return sorted(domain.name() for domain in _using(connection, disk))

    def attach(
        self,
        disk: Disk,
        name: str,
        *,
        target: str | None,
        read_only: bool,
        content: Content,
        settled: Callable[[], None],
    ) -> str:
        """Add the disk to the domain *name*: to its definition, and at once if it runs.

        :param disk: with the host caching that it is to have.
        :param target: its name in the guest; the first free one unless given.
        :param content: what is on it, for policies to look at.
        :param settled: called when nothing of ours stands against it, before the domain is given anything.
        :return: the target.
        :raise DiskInUseError: When a domain has it already.
        :raise PolicyError: When a rule refuses it; or it is to be cached, and the domain has no encryption at
            host.
        :raise LibvirtError: When there is no such domain, or libvirt refuses.
        """
        if disk.state is not DiskState.READY:
            raise DiskStateError(f"disk {disk.name!r} is {disk.state.value}")
        with connected(self._uri) as connection:
            if users := [domain.name() for domain in _using(connection, disk)]:
                raise DiskInUseError(f"disk {disk.name!r} is attached to domain {users[0]!r}")
            domain = _lookup(connection, name)
            at_host = has_encryption_at_host(domain.XMLDesc())
            self._plugins.validate(AttachDisk(disk, name, at_host, content))
            refuse_unencrypted(name, VmProperties(at_host), (disk,), has_temp_disk=False)
            settled()
            target = target or domain_xml.free_target(domain.XMLDesc())
            element = self.element(disk, target=target, read_only=read_only)
            with contextlib.ExitStack() as undo:
                if domain.isActive():
                    uses = domain_xml.our_disks(f"<domain><devices>{element}</devices></domain>")
                    undo.callback(self._forget, domain, disk)
                    self.serving.serve(connection, name, domain.XMLDesc(), uses)
                domain.attachDeviceFlags(element, sum(_definitions(domain)))
                undo.pop_all()
        return target

    def detach(self, disk: Disk, name: str) -> None:
        """Take the disk out of the domain *name*: out of its definition, and at once if it runs.

        :raise DiskNotFoundError: When the domain does not have it.
        :raise LibvirtError: When libvirt refuses, or the guest does not let go in time.
        """
        with connected(self._uri) as connection:
            domain = _lookup(connection, name)
            found = [(flag, use) for flag in _definitions(domain) for use in _uses(domain, flag, disk)]
            if not found:
                raise DiskNotFoundError(f"domain {name!r} does not have disk {disk.name!r}")
            for definition, use in found:
                with _ending_is_fine(domain, definition):
                    element = self.element(disk, target=use.target, read_only=False)
                    domain.detachDeviceFlags(element, definition)
            with _ending_is_fine(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE):
                self._await_unplug(domain, disk)
            self._forget(domain, disk)

    def _forget(self, domain: libvirt.virDomain, disk: Disk) -> None:
        """Take away what a domain was given of the disk."""
        for entry in disk.deks:
            drop_secret(domain.connect(), disk.id, entry.slot)
        self._stages.stop(disk.id, domain_id=UUID(domain.UUIDString()))

    def _await_unplug(self, domain: libvirt.virDomain, disk: Disk) -> None:
        """The guest itself must let go of a disk of a running domain."""
        deadline = time.monotonic() + _UNPLUG_SECONDS
        while _is_active(domain) and _uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk):
            if time.monotonic() > deadline:
                raise LibvirtError(
                    f"the guest in domain {domain.name()!r} did not let go of disk {disk.name!r} "
                    f"within {_UNPLUG_SECONDS:g} s",
                    hint="the disk goes away as soon as the guest lets go, or stops",
                )
            time.sleep(0.1)

    def resize_live(self, disk: Disk, size: int) -> bool:
        """Resize the disk in the running domain that has it, if one does; whether one did.

        :raise StageError: When what is below the domain's QEMU cannot grow under it.
        :raise LibvirtError: When libvirt refuses.
        """
        try:
            with connected(self._uri) as connection:
                for domain in _using(connection, disk):
                    if domain.isActive():
                        (use, *_) = _uses(domain, libvirt.VIR_DOMAIN_AFFECT_LIVE, disk)
                        self._stages.grow(disk, size, reconnects=use.reconnects)
                        _block_resize(domain, use.target, size)
                        return True
        except LibvirtUnavailableError:
            pass  # then QEMU's lock on the image tells whether a domain has it
        return False

    def element(self, disk: Disk, *, target: str, read_only: bool) -> str:
        """The ``<disk>`` element with which a domain uses the disk.

        :raise InvalidValueError: When *target* is no name of a disk in a guest.
        """
        return domain_xml.disk_element(self.serving.source(disk), target=target, read_only=read_only)


def _block_resize(domain: libvirt.virDomain, target: str, size: int) -> None:
    """Resize a disk in a running domain, whose QEMU may have to connect again to what is below it."""
    deadline = time.monotonic() + _RECONNECT_SECONDS
    while True:
        try:
            domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            return
        except libvirt.libvirtError as exc:
            if "NBD" not in str(exc) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _lookup(connection: libvirt.virConnect, name: str) -> libvirt.virDomain:
    try:
        return connection.lookupByName(name)
    except (libvirt.libvirtError, UnicodeEncodeError) as exc:
        raise LibvirtError(f"no domain {name!r}: {exc}") from exc


@contextlib.contextmanager
def _ending_is_fine(domain: libvirt.virDomain, definition: int) -> Iterator[None]:
    """A domain that ends while a disk is taken out of its live definition has none any more."""
    try:
        yield
    except libvirt.libvirtError:
        # libvirt tells the caller that QEMU's monitor is gone before it notes that the domain is.
        deadline = time.monotonic() + _ENDING_SECONDS
        while definition == libvirt.VIR_DOMAIN_AFFECT_LIVE and time.monotonic() < deadline:
            if not _is_active(domain):
                return
            time.sleep(0.05)
        raise


def _is_active(domain: libvirt.virDomain) -> bool:
    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # a transient one is gone when it ends
            raise
        return False


def _definitions(domain: libvirt.virDomain) -> list[int]:
    """Which of its two definitions a domain has: the persistent one, the live one, or both."""
    flags = []
    if domain.isPersistent():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    if domain.isActive():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_LIVE)
    return flags


def _uses(domain: libvirt.virDomain, definition: int, disk: Disk) -> list[domain_xml.DomainDisk]:
    """How one definition of the domain uses the disk."""
    inactive = definition == libvirt.VIR_DOMAIN_AFFECT_CONFIG
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)
    return [use for use in domain_xml.our_disks(xml) if use.disk_id == disk.id]


def _using(connection: libvirt.virConnect, disk: Disk) -> list[libvirt.virDomain]:
    """The domains that have the disk in any definition."""
    found = []
    for domain in connection.listAllDomains():
        try:
            if any(_uses(domain, definition, disk) for definition in _definitions(domain)):
                found.append(domain)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone since it was listed
                raise
    return found
