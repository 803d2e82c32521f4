"""``vm protect``: the store keeps a domain's definition, so that another host can take the domain over.

Who may write to the database may not choose what root runs on a host: a seal under the host key, which hosts
that share images have in common, authenticates the definition.
"""

from __future__ import annotations

import hmac
from uuid import UUID

import libvirt

from virt_sse.errors import LibvirtError, VirtSseError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.protected_domains import Evacuation, ProtectedDomain

_PURPOSE = b"virt-sse protected domain v1"
_AUTOSTARTED, _NOT_AUTOSTARTED = b"\x01", b"\x00"


class DomainProtection:
    """Keeps definitions of this host's domains in the store."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def protect(self, name: str) -> None:
        """Keep a domain's definition in the store. The agent follows later changes of the domain.

        :raise VmStateError: When the store is this host's alone, the definition has what does not reach
            another host, or the domain is another host's.
        :raise LibvirtError: When no domain has the name, or libvirt fails.
        :raise HostKeyError: When the host key cannot be used.
        """
        if not self._host.leases.are_shared:
            raise VmStateError(
                "a store in SQLite is this host's alone: no other host could start the domain",
                hint="hosts share a store in PostgreSQL, see the guide to many hosts",
            )
        with connected(self._host.config.libvirt_uri) as connection:
            domain = domains.lookup(connection, name)
            _refuse_local_parts(domain)
            found = self._read(domain)
        self._host.leases.renew()
        self._host.store.protected_domains.protect(found)

    def unprotect(self, name: str) -> None:
        """Remove a domain from the store; libvirt keeps the domain.

        :param name: name or UUID; libvirt need not have the domain.
        :raise VmStateError: When no protected domain, or more than one, has the name.
        """
        store = self._host.store.protected_domains
        found = [each for each in store.all() if name in (each.name, str(each.id))]
        if len(found) != 1:
            what = "several protected domains are" if found else "no protected domain is"
            raise VmStateError(f"{what} called {name[:80]!r}")
        store.unprotect(found[0].id)

    def follow(self, connection: libvirt.virConnect) -> list[tuple[str, VirtSseError]]:
        """Bring the store in step with this host's domains; a domain that runs here becomes this host's.

        :return: names of domains that cannot be kept, each with the reason.
        :raise libvirt.libvirtError: When libvirt fails.
        """
        store, problems = self._host.store.protected_domains, []
        defined = {UUID(bytes=domain.UUID()): domain for domain in connection.listAllDomains()}
        for kept in store.with_ids(defined.keys()):
            domain = defined[kept.id]
            with domains.gone_is_fine():
                is_active = domains.is_active(domain)
                if not is_active and kept.host_id != self._host.leases.identity.id:
                    continue
                try:
                    if is_active:
                        _refuse_local_parts(domain)
                    present = self._read(domain, Evacuation.NOTHING if is_active else kept.evacuation)
                    if present != kept:
                        store.follow(present, kept.host_id)
                except VirtSseError as exc:
                    problems.append((kept.name, exc))
        return problems

    def check(self, domain: ProtectedDomain) -> None:
        """Refuse a definition that no host with this host key has written.

        :raise VmStateError: When the seal does not authenticate the definition.
        :raise HostKeyError: When the host key cannot be used.
        """
        is_ours = hmac.compare_digest(domain.seal, self._seal(domain.definition, domain.is_autostarted))
        if not is_ours or DomainDefinition.parse(domain.definition).uuid != domain.id:
            raise VmStateError(
                f"no host with this host key has written the definition of domain {domain.name!r}",
                hint="hosts that share images need the same host.key; otherwise the database was changed",
            )

    def _read(
        self, domain: libvirt.virDomain, evacuation: Evacuation = Evacuation.NOTHING
    ) -> ProtectedDomain:
        definition, is_autostarted = _xml(domain), bool(domain.isPersistent() and domain.autostart())
        return ProtectedDomain(
            id=UUID(bytes=domain.UUID()),
            name=domain.name(),
            host_id=self._host.leases.identity.id,
            definition=definition,
            is_autostarted=is_autostarted,
            seal=self._seal(definition, is_autostarted),
            evacuation=evacuation,
        )

    def _seal(self, definition: str, is_autostarted: bool) -> bytes:
        key = self._host.freshness.host_key.subkey(_PURPOSE)
        content = (_AUTOSTARTED if is_autostarted else _NOT_AUTOSTARTED) + definition.encode()
        return hmac.digest(key, content, "sha256")


def _refuse_local_parts(domain: libvirt.virDomain) -> None:
    """Refuse a domain with parts that stay on this host.

    :raise VmStateError: When the domain has a password or a TPM.
    """
    name, xml = domain.name(), _xml(domain)
    if xml != _xml(domain, libvirt.VIR_DOMAIN_XML_SECURE):
        raise VmStateError(
            f"the definition of domain {name!r} has a password, which the store does not keep",
            hint="without the password, another host would open the domain's screen to everybody",
        )
    definition = DomainDefinition.parse(xml)
    if definition.has_emulated_tpm and not definition.has_tpm_state_elsewhere:
        raise VmStateError(
            f"the state of the TPM of domain {name!r} is a file of this host",
            hint="with a new TPM, the guest might not open its own disks",
        )


def _xml(domain: libvirt.virDomain, flags: int = 0) -> str:
    try:
        return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | flags))
    except libvirt.libvirtError as exc:
        if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            raise
        raise LibvirtError(f"cannot read the definition of domain {domain.name()!r}: {exc}") from exc
