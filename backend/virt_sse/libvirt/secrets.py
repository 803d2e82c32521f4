"""Ephemeral, private libvirt secrets: libvirt holds the value in memory only and never returns the value."""

from __future__ import annotations

import base64
import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from html import escape
from uuid import NAMESPACE_URL, UUID, uuid5

import libvirt

from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.keys import Dek
from virt_sse.model.slots import TPM_SLOT

_SET_AT = re.compile(r"<description>virt-sse: set at ([0-9.]+) s</description>")
"""``CLOCK_MONOTONIC`` of the host: the agent tells secrets that any process has just set again."""


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
        f"<description>virt-sse: set at {time.monotonic():.3f} s</description>"
        f"<usage type='{kind}'><{element}>{escape(name.usage)}</{element}></usage>"
        f"</secret>"
    )
    try:
        secret.setValue(dek.passphrase)
    except BaseException:
        secret.undefine()
        raise


def set_ceph_secret(connection: libvirt.virConnect, usage: str, key: bytes) -> None:
    """Define the secret with the key of a Ceph user, for all disks in Ceph, or replace it.

    :param usage: usage id of the secret.
    :param key: in base64.
    :raise libvirt.libvirtError: When libvirt refuses.
    """
    secret = connection.secretDefineXML(
        f"<secret ephemeral='yes' private='yes'>"
        f"<uuid>{uuid5(NAMESPACE_URL, usage)}</uuid>"
        f"<usage type='ceph'><name>{escape(usage)}</name></usage>"
        f"</secret>"
    )
    secret.setValue(base64.b64decode(key))


def set_secrets(connection: libvirt.virConnect, deks: Mapping[SecretName, Dek]) -> None:
    """Define all secrets, or none if libvirt refuses any.

    :raise libvirt.libvirtError: When libvirt refuses a secret.
    """
    with contextlib.ExitStack() as undo:
        for name, dek in deks.items():
            undo.callback(drop_secret, connection, name)
            set_secret(connection, name, dek)
        undo.pop_all()


def drop_secret(connection: libvirt.virConnect, name: SecretName, *, spared_seconds: float = 0.0) -> bool:
    """Remove the secret *name* from libvirt. A missing secret is not an error.

    :param spared_seconds: leaves a secret set in the last *spared_seconds*.
    :return: whether there was such a secret, and it was removed.
    :raise libvirt.libvirtError: When libvirt fails.
    """
    try:
        secret = connection.secretLookupByUUID(name.uuid.bytes)
        found = _SET_AT.search(secret.XMLDesc()) if spared_seconds else None
        if found and time.monotonic() - float(found[1]) < spared_seconds:
            return False
        secret.undefine()
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_SECRET:
            raise
        return False
    return True


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
