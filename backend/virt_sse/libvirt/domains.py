"""Lookups of domains, and of definitions of domains that may end or be undefined at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from uuid import UUID

import libvirt

from virt_sse.errors import LibvirtError
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.domain_definition import DomainDefinition

_MIGRATING = frozenset({libvirt.VIR_DOMAIN_PAUSED_MIGRATION, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY})


def lookup(connection: libvirt.virConnect, name: str) -> libvirt.virDomain:
    """Find a domain by its name.

    :raise LibvirtError: When no domain has the name.
    """
    try:
        return connection.lookupByName(name)
    except (libvirt.libvirtError, UnicodeEncodeError) as exc:
        raise LibvirtError(f"no domain {name!r}: {exc}") from exc


def find(connection: libvirt.virConnect, domain_id: UUID) -> libvirt.virDomain | None:
    """Find a domain by its UUID; ``None`` if no domain has the UUID.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    with gone_is_fine():
        return connection.lookupByUUID(domain_id.bytes)
    return None


@contextlib.contextmanager
def gone_is_fine(*, or_ended: bool = False) -> Iterator[None]:
    """Leave the block silently when libvirt reports that the domain no longer exists.

    :param or_ended: also when the domain no longer runs.
    :raise libvirt.libvirtError: For any other failure.
    """
    codes = {libvirt.VIR_ERR_NO_DOMAIN}
    if or_ended:
        codes.add(libvirt.VIR_ERR_OPERATION_INVALID)
    try:
        yield
    except libvirt.libvirtError as exc:
        if exc.get_error_code() not in codes:
            raise


def is_active(domain: libvirt.virDomain) -> bool:
    """Whether the domain runs; false also for a transient domain that has ended and so no longer exists.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    with gone_is_fine():
        return bool(domain.isActive())
    return False


def leaves(domain: libvirt.virDomain) -> bool:
    """Whether the domain is paused because it migrates, its state complete or about to be.

    True at the destination, too, until the domain runs there.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    state, reason = domain.state()
    return state == libvirt.VIR_DOMAIN_PAUSED and reason in _MIGRATING


def runs(connection: libvirt.virConnect, domain_id: UUID) -> bool:
    """Whether a domain has the UUID and runs.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    domain = find(connection, domain_id)
    return domain is not None and is_active(domain)


def definition(
    domain: libvirt.virDomain, *, inactive: bool = False, secure: bool = False
) -> DomainDefinition:
    """Read a definition of the domain.

    :param inactive: the persistent definition; the live definition of a running domain otherwise.
    :param secure: with all passwords in the definition, as required for defining the domain again.
    :raise InvalidValueError: When libvirt's XML is outside the parser's limits.
    :raise libvirt.libvirtError: When libvirt fails, or the domain no longer exists.
    """
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
    return DomainDefinition.parse(domain.XMLDesc(flags | (libvirt.VIR_DOMAIN_XML_SECURE if secure else 0)))


def running_backup(domain: libvirt.virDomain) -> BackupJob | None:
    """The domain's running backup; ``None`` without one.

    :raise InvalidValueError: When libvirt's XML is outside the parser's limits.
    :raise libvirt.libvirtError: When libvirt fails.
    """
    xml = _backup_xml(domain)
    return BackupJob.parse(xml) if xml is not None else None


def salvaged_backup(domain: libvirt.virDomain) -> tuple[BackupJob | None, list[str]]:
    """As :func:`running_backup`, for work that must not fail open; see :meth:`BackupJob.salvage`.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    xml = _backup_xml(domain)
    return BackupJob.salvage(xml) if xml is not None else (None, [])


def _backup_xml(domain: libvirt.virDomain) -> str | None:
    try:
        return str(domain.backupGetXMLDesc())
    except libvirt.libvirtError as exc:
        if exc.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_NO_SUPPORT):
            raise
        return None
