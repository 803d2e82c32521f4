"""Ephemeral, private libvirt secrets: libvirt keeps them in memory only and never gives them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from html import escape
from uuid import UUID

import libvirt

from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.references import secret_uuid, usage
from virt_sse.model.keys import Dek
from virt_sse.model.slots import TPM_SLOT


def set_secret(connection: libvirt.virConnect, disk_id: UUID, slot: str, dek: Dek) -> None:
    """Give libvirt the DEK in *slot* of a disk; one that it has is replaced.

    :raise libvirt.libvirtError: When libvirt refuses.
    """
    kind, name = ("vtpm", "name") if slot == TPM_SLOT else ("volume", "volume")  # libvirt formatsecret
    secret = connection.secretDefineXML(
        f"<secret ephemeral='yes' private='yes'>"
        f"<uuid>{secret_uuid(disk_id, slot)}</uuid>"
        f"<usage type='{kind}'><{name}>{escape(usage(disk_id, slot))}</{name}></usage>"
        f"</secret>"
    )
    try:
        secret.setValue(dek.passphrase)
    except BaseException:
        secret.undefine()
        raise


def set_secrets(connection: libvirt.virConnect, deks: Mapping[tuple[UUID, str], Dek]) -> None:
    """Give libvirt the DEKs in those slots of those disks, all or none.

    :raise libvirt.libvirtError: When libvirt refuses one.
    """
    with contextlib.ExitStack() as undo:
        for (disk_id, slot), dek in deks.items():
            undo.callback(drop_secret, connection, disk_id, slot)
            set_secret(connection, disk_id, slot, dek)
        undo.pop_all()


def drop_secret(connection: libvirt.virConnect, disk_id: UUID, slot: str) -> None:
    """Take the DEK back from libvirt. No error when it has none.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    try:
        connection.secretLookupByUUID(secret_uuid(disk_id, slot).bytes).undefine()
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
            raise


def drop_secrets(uri: str, references: Iterable[tuple[UUID, str]]) -> None:
    """Take the DEKs in those slots of those disks back from the libvirt at *uri*.

    A disk that a running domain has stays open there: QEMU has its key already.

    :raise LibvirtError: When libvirt does not answer or fails.
    """
    with connected(uri) as connection:
        for disk_id, slot in references:
            drop_secret(connection, disk_id, slot)
