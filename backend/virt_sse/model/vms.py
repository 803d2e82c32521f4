"""Virtual machines: properties of libvirt domains, apart from their disks."""

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
"""Host id of a VM not seen on any host yet."""

_SIZE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class VmProperties:
    """Requested properties of a VM, kept in the store and in the domain's metadata.

    :ivar encryption_at_host: whether all guest data on the host must be encrypted.
    :ivar size: VM size by the cloud's name, e.g. ``Standard_D2s_v3``; used by policies only.
    :ivar temp_disk_size: size of the temporary disk in bytes; ``None`` for no temporary disk.
    """

    encryption_at_host: bool = False
    size: str | None = None
    temp_disk_size: int | None = None


@dataclass(frozen=True, slots=True)
class PendingUpdate:
    """An update of a VM in progress: committed once libvirt accepts the new definition, else rolled back.

    :ivar caching: new host caching, by disk id.
    """

    properties: VmProperties
    caching: Mapping[UUID, HostCaching] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Vm:
    """The store's record of a domain.

    :ivar id: UUID of the domain.
    :ivar name: last known name of the domain.
    :ivar host: UUID of the last known libvirt host.
    :ivar generation: number of updates; also in the domain's metadata, to detect an interrupted update.
    :ivar pending: an update in progress, or interrupted because its command was killed.
    :ivar tpm: wrapped DEK of the emulated TPM's state, if virt-sse encrypts the state.
    """

    id: UUID
    name: str
    host: UUID
    properties: VmProperties = VmProperties()
    generation: int = 0
    pending: PendingUpdate | None = None
    tpm: WrappedDek | None = None


def tpm_context(vm_id: UUID) -> DekContext:
    """The context to which the DEK of a VM's TPM state is bound."""
    return DekContext(vm_id, TPM_SLOT)


def temp_disk_id(vm_id: UUID) -> UUID:
    """The id of a VM's temporary disk: constant, because the domain's definition contains the id."""
    return uuid.uuid5(vm_id, TEMP_SLOT)


def check_size_name(name: str) -> str:
    """Return *name* if a VM size may have this name.

    :raise InvalidValueError: When *name* is invalid.
    """
    if not _SIZE_NAME.fullmatch(name):
        raise InvalidValueError(f"invalid VM size {name[:80]!r}", hint="e.g. Standard_D2s_v3")
    return name
