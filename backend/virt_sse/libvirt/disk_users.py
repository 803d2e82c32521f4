"""The domains that use a disk."""

from __future__ import annotations

from uuid import UUID

import libvirt

from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_element import DomainDisk


def names(uri: str, disk_id: UUID) -> list[str]:
    """List the names of the domains with the disk, running or only defined.

    :raise LibvirtUnavailableError: When libvirt does not answer.
    """
    with connected(uri) as connection:
        return sorted(domain.name() for domain in using(connection, disk_id))


def definitions(domain: libvirt.virDomain) -> list[int]:
    """List the definitions of a domain as libvirt flags: persistent, live, or both."""
    flags = []
    if domain.isPersistent():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    if domain.isActive():
        flags.append(libvirt.VIR_DOMAIN_AFFECT_LIVE)
    return flags


def uses(domain: libvirt.virDomain, flag: int, disk_id: UUID) -> list[DomainDisk]:
    """List the uses of the disk in a definition of the domain.

    :param flag: selects the definition, as in :func:`definitions`.
    """
    definition = domains.definition(domain, inactive=flag == libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    return [use for use in definition.our_disks if use.disk_id == disk_id]


def using(connection: libvirt.virConnect, disk_id: UUID) -> list[libvirt.virDomain]:
    """List the domains with the disk in any definition."""
    found = []
    for domain in connection.listAllDomains():
        with domains.gone_is_fine():
            if any(uses(domain, flag, disk_id) for flag in definitions(domain)):
                found.append(domain)
    return found
