"""How a domain's XML names a DEK: ``<secret type='passphrase' usage='virt-sse:DISK-ID:SLOT'/>``.

The name says whose secret it is, so that the hook can tell a domain with a disk of ours from any other with
no store and no agent to ask. Standard library only: the hook reads this before it reads anything else.
"""

from __future__ import annotations

import uuid

PREFIX = "virt-sse:"

VM_NAMESPACE = "https://virt-sse.invalid/vm/1"
"""Of the element in a domain's metadata that says what is asked of the VM, beside its disks."""


def usage(disk_id: uuid.UUID, slot: str) -> str:
    """The usage id of the libvirt secret that holds the DEK in *slot* of a disk."""
    return f"{PREFIX}{disk_id}:{slot}"


def parse_usage(text: str) -> tuple[uuid.UUID, str] | None:
    """Disk id and slot of a usage id; ``None`` when it is not one of ours.

    :raise ValueError: When it is one of ours and makes no sense.
    """
    if not text.startswith(PREFIX):
        return None
    disk_id, _, slot = text.removeprefix(PREFIX).partition(":")
    if not slot:
        raise ValueError(f"no slot in {text!r}")
    return uuid.UUID(disk_id), slot


def secret_uuid(disk_id: uuid.UUID, slot: str) -> uuid.UUID:
    """The UUID of that libvirt secret: always the same, so that setting it twice makes one secret."""
    return uuid.uuid5(disk_id, slot)
