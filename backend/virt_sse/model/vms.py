"""Virtual machines: what a libvirt domain is asked to be, beside what its disks are."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.model.keys import DekContext, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT

NOWHERE = UUID(int=0)
"""The host of a VM that has not been seen on one."""

_SIZE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class VmProperties:
    """What a VM is to have; libvirt keeps it in the domain's metadata, and we do in the store.

    :ivar encryption_at_host: whether nothing of the guest may lie on the host in plaintext.
    :ivar size: the VM's size in the cloud's words, e.g. ``Standard_D2s_v3``; a name for policies to go by.
    :ivar temp_disk_size: of its temporary disk, in bytes; ``None`` for none.
    """

    encryption_at_host: bool = False
    size: str | None = None
    temp_disk_size: int | None = None


@dataclass(frozen=True, slots=True)
class PendingUpdate:
    """What a command is making of a VM: committed once libvirt has taken the new definition, else undone.

    :ivar caching: by the id of a disk, what the host is to cache of it.
    """

    properties: VmProperties
    caching: Mapping[UUID, HostCaching] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vm:
    """What the store knows of a domain.

    :ivar id: the domain's UUID.
    :ivar name: the domain's name, when it was last seen.
    :ivar host: the UUID of the libvirt host that it was last seen on.
    :ivar generation: counts the updates; in the metadata too, so that one that was cut off can be told from
        none.
    :ivar pending: an update that is under way, or was when its command was killed.
    :ivar tpm: the DEK of its emulated TPM's state, if that is encrypted by us.
    """

    id: UUID
    name: str
    host: UUID
    properties: VmProperties = VmProperties()
    generation: int = 0
    pending: PendingUpdate | None = None
    tpm: WrappedDek | None = None


def tpm_context(vm_id: UUID) -> DekContext:
    """What the DEK of a VM's TPM is bound to."""
    return DekContext(vm_id, TPM_SLOT)


def temp_disk_id(vm_id: UUID) -> UUID:
    """The id of a VM's temporary disk: always the same, because the domain's definition names it."""
    return uuid.uuid5(vm_id, TEMP_SLOT)


def check_size_name(name: str) -> str:
    """*name*, if a VM size may be called so.

    :raise InvalidValueError: When it may not.
    """
    if not _SIZE_NAME.fullmatch(name):
        raise InvalidValueError(f"{name[:80]!r} is no VM size", hint="e.g. Standard_D2s_v3")
    return name
