"""Thin call of :mod:`virt_sse.libvirt.capabilities` for unconverted callers."""

from __future__ import annotations

from uuid import UUID

import libvirt

from virt_sse.libvirt.capabilities import HostCapabilities


def host_id(connection: libvirt.virConnect) -> UUID:
    return HostCapabilities.of(connection).host_id
