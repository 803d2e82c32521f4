"""Thin calls of :mod:`virt_sse.libvirt.secret_name` for unconverted callers."""

from __future__ import annotations

from uuid import UUID

from virt_sse.libvirt.secret_name import PREFIX, SecretName
from virt_sse.libvirt.vm_metadata import VM_NAMESPACE

__all__ = ["PREFIX", "VM_NAMESPACE", "parse_usage", "secret_uuid", "usage"]


def usage(disk_id: UUID, slot: str) -> str:
    return SecretName(disk_id, slot).usage


def parse_usage(text: str) -> tuple[UUID, str] | None:
    name = SecretName.parse(text)
    return (name.owner, name.slot) if name else None


def secret_uuid(disk_id: UUID, slot: str) -> UUID:
    return SecretName(disk_id, slot).uuid
