"""Ephemeral, private libvirt secrets: libvirt keeps them in memory only and never gives them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from html import escape
from uuid import UUID

import libvirt

from virt_sse.keys import Dek
from virt_sse.libvirt.references import secret_uuid, usage


def set_secret(connection: libvirt.virConnect, disk_id: UUID, slot: str, dek: Dek) -> None:
    """Give libvirt the DEK in *slot* of a disk; one that it has is replaced.

    :raise libvirt.libvirtError: When libvirt refuses.
    """
    secret = connection.secretDefineXML(
        f"<secret ephemeral='yes' private='yes'>"
        f"<uuid>{secret_uuid(disk_id, slot)}</uuid>"
        f"<usage type='volume'><volume>{escape(usage(disk_id, slot))}</volume></usage>"
        f"</secret>"
    )
    try:
        secret.setValue(dek.passphrase)
    except BaseException:
        secret.undefine()
        raise


def drop_secret(connection: libvirt.virConnect, disk_id: UUID, slot: str) -> None:
    """Take the DEK back from libvirt. No error when it has none.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    with _absent_is_fine():
        connection.secretLookupByUUID(secret_uuid(disk_id, slot).bytes).undefine()


def has_secret(connection: libvirt.virConnect, disk_id: UUID, slot: str) -> bool:
    """Whether libvirt holds the DEK in *slot* of a disk.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    with _absent_is_fine():
        connection.secretLookupByUUID(secret_uuid(disk_id, slot).bytes)
        return True
    return False


@contextlib.contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
            raise
