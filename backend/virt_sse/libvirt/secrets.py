"""Ephemeral, private libvirt secrets: libvirt holds the value in memory only and never returns the value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from html import escape
from uuid import UUID

import libvirt

from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.keys import Dek
from virt_sse.model.slots import TPM_SLOT


def set_secret(connection: libvirt.virConnect, name: SecretName, dek: Dek) -> None:
    """Define the secret *name* with the DEK as value, and replace an existing secret.

    :raise libvirt.libvirtError: When libvirt refuses.
    """
    kind, element = (
        ("vtpm", "name") if name.slot == TPM_SLOT else ("volume", "volume")
    )  # libvirt formatsecret
    secret = connection.secretDefineXML(
        f"<secret ephemeral='yes' private='yes'>"
        f"<uuid>{name.uuid}</uuid>"
        f"<usage type='{kind}'><{element}>{escape(name.usage)}</{element}></usage>"
        f"</secret>"
    )
    try:
        secret.setValue(dek.passphrase)
    except BaseException:
        secret.undefine()
        raise


def set_secrets(connection: libvirt.virConnect, deks: Mapping[SecretName, Dek]) -> None:
    """Define all secrets, or none if libvirt refuses any.

    :raise libvirt.libvirtError: When libvirt refuses a secret.
    """
    with contextlib.ExitStack() as undo:
        for name, dek in deks.items():
            undo.callback(drop_secret, connection, name)
            set_secret(connection, name, dek)
        undo.pop_all()


def drop_secret(connection: libvirt.virConnect, name: SecretName) -> None:
    """Remove the secret *name* from libvirt. A missing secret is not an error.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    try:
        connection.secretLookupByUUID(name.uuid.bytes).undefine()
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
            raise


def drop_secrets_of(connection: libvirt.virConnect, disk_id: UUID) -> None:
    """Remove all secrets with DEKs of a disk, also of a disk that the store no longer has.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    for secret in connection.listAllSecrets():
        with contextlib.suppress(ValueError):  # malformed usage ids are no secrets of disks
            name = SecretName.parse(str(secret.usageID() or ""))
            if name and name.owner == disk_id:
                drop_secret(connection, name)


def drop_secrets(uri: str, names: Iterable[SecretName]) -> None:
    """Remove secrets from the libvirt at *uri*. Disks of running domains stay open: QEMU has the keys.

    :raise LibvirtError: When libvirt does not answer or fails.
    """
    with connected(uri) as connection:
        for name in names:
            drop_secret(connection, name)
