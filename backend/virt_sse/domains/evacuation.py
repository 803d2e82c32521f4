"""``virt-sse host evacuate``: this host takes over the protected domains of a fenced host.

The store decides which host takes a domain, one domain after the other: several hosts may evacuate one host
at once. A domain that cannot be defined or started here is given back. A command killed in the middle leaves
a domain of this host with work to do, which the next command of this host finishes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import libvirt

from virt_sse.domains.protection import DomainProtection
from virt_sse.errors import VirtSseError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.model.hosts import HostRecord
from virt_sse.model.protected_domains import Evacuation, ProtectedDomain


class TakeoverResult(enum.Enum):
    """What became of a domain."""

    STARTED = "started"
    DEFINED = "defined"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Evacuated:
    """A domain after the attempt to take it over.

    :ivar reason: why the domain was not taken over.
    """

    domain: ProtectedDomain
    result: TakeoverResult
    reason: VirtSseError | None = None


class Evacuator:
    """Takes over domains of hosts whose machines are off."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._store = host.store.protected_domains
        self._protection = DomainProtection(host)

    def due(self, other: HostRecord) -> list[ProtectedDomain]:
        """The domains that :meth:`evacuate` would take over, those of a killed command included.

        Of a host that is not fenced yet, all its protected domains; fencing tells which of them ran.
        """
        ours = self._host.leases.identity.id
        return [
            each
            for each in self._store.all()
            if each.host_id == other.id
            or (each.host_id == ours and each.evacuation is not Evacuation.NOTHING)
        ]

    def evacuate(self, other: HostRecord, report: Callable[[Evacuated], None]) -> None:
        """Take over the domains of a fenced host, and start those that ran there.

        :param report: called for each domain.
        :raise VmStateError: When *other* is not fenced.
        :raise HostFencedError: When this host was fenced.
        :raise LibvirtError: When libvirt does not answer.
        """
        if not other.is_fenced:
            raise VmStateError(
                f"host {other.name!r} is not fenced", hint=f"'virt-sse host fence {other.name}' comes first"
            )
        self._host.leases.renew()
        with connected(self._host.config.libvirt_uri) as connection:
            for domain in self.due(other):
                try:
                    result = self._take(connection, domain)
                    report(Evacuated(domain, result))
                except (VirtSseError, libvirt.libvirtError) as exc:
                    reason = exc if isinstance(exc, VirtSseError) else VmStateError(str(exc))
                    report(Evacuated(domain, TakeoverResult.FAILED, reason))

    def _take(self, connection: libvirt.virConnect, domain: ProtectedDomain) -> TakeoverResult:
        ours = self._host.leases.identity.id
        self._protection.check(domain)
        if domain.host_id != ours:
            self._store.take(domain, ours)
        try:
            result = _define_and_start(connection, domain)
        except BaseException:
            if domain.host_id != ours:
                self._store.give_back(domain, ours)
            raise
        self._store.settle(domain.id)
        return result


def _define_and_start(connection: libvirt.virConnect, domain: ProtectedDomain) -> TakeoverResult:
    """Define a domain, and start the domain if it ran. After a failure, nothing of a new domain stays.

    :raise libvirt.libvirtError: When libvirt refuses.
    """
    is_new = domains.find(connection, domain.id) is None
    defined = connection.defineXML(domain.definition)
    try:
        if domains.is_active(defined):
            return TakeoverResult.STARTED
        if domain.evacuation is Evacuation.START:
            defined.create()
        defined.setAutostart(domain.is_autostarted)
    except BaseException:
        if is_new and not domains.is_active(defined):
            with domains.gone_is_fine():
                defined.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
        raise
    return TakeoverResult.STARTED if domain.evacuation is Evacuation.START else TakeoverResult.DEFINED
