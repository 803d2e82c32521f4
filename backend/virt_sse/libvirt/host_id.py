"""Which libvirt host one is connected to (libvirt formatcaps)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from uuid import UUID

import libvirt

from virt_sse.errors import LibvirtError


def host_id(connection: libvirt.virConnect) -> UUID:
    """The host's UUID: the same after every restart, and no other host's.

    :raise LibvirtError: When it has none.
    :raise libvirt.libvirtError: When libvirt fails.
    """
    text = ET.fromstring(connection.getCapabilities()).findtext("./host/uuid", "")  # noqa: S314 -- from libvirtd, which is trusted
    try:
        return UUID(text)
    except ValueError as exc:
        raise LibvirtError(f"libvirt's host has no UUID but {text[:40]!r}") from exc
