"""Backups that libvirt has under way."""

from __future__ import annotations

import libvirt


def backup_xml(domain: libvirt.virDomain) -> str | None:
    """libvirt's XML of a domain's backup; ``None`` when none is under way.

    :raise libvirt.libvirtError: When libvirt does not say.
    """
    try:
        return str(domain.backupGetXMLDesc())
    except libvirt.libvirtError as exc:
        if exc.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_NO_SUPPORT):
            raise
        return None
