"""The operations subject to policies: arguments of the hook ``virt_sse_validate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import DiskSku
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType

if TYPE_CHECKING:
    from virt_sse.model.content import Content
    from virt_sse.model.disk_format import DiskFormat
    from virt_sse.model.disks import Disk
    from virt_sse.model.encryption_sets import EncryptionSet
    from virt_sse.model.vms import VmProperties


@dataclass(frozen=True, slots=True)
class Site:
    """Location of a host: all disks and VMs of a host are in one region.

    :ivar tables: the site's own file of supported features by region, if any; replaces the profile.
    :ivar enforce: whether the cloud's rules are enforced.
    :ivar profile: name of the built-in tables to follow.
    """

    subscription: str = "default"
    region: str = "default"
    tables: Path | None = None
    enforce: bool = True
    profile: str = "current"


@dataclass(frozen=True, slots=True)
class CreateDisk:
    """Create a disk of *size* bytes, import an image, adopt a disk, or copy a disk.

    :ivar content: content of the new disk; ``None`` for an empty disk, and for a copy whose source has the
        same kind of key.
    :ivar source: the disk or copy with the original content, if any.
    :ivar kind: a disk, or a copy that no domain can use.
    """

    name: str
    size: int
    path: Path
    format: DiskFormat
    encryption_type: EncryptionType
    key: KeyRef
    content: Content | None = field(default=None, compare=False, repr=False)
    sku: DiskSku = DiskSku.PREMIUM_SSD
    source: Disk | None = None
    kind: DiskKind = DiskKind.DISK


@dataclass(frozen=True, slots=True)
class ResizeDisk:
    """Change the size of a disk to *size* bytes."""

    disk: Disk
    size: int


@dataclass(frozen=True, slots=True)
class ExportDisk:
    """Write the plaintext content of a disk to *destination*."""

    disk: Disk
    destination: Path


@dataclass(frozen=True, slots=True)
class DeleteDisk:
    """Delete a disk for a time or for good, or destroy a deleted disk, whose state is ``deleted``."""

    disk: Disk


@dataclass(frozen=True, slots=True)
class CreateEncryptionSet:
    """Create a disk encryption set."""

    encryption_set: EncryptionSet


@dataclass(frozen=True, slots=True)
class MoveDisk:
    """Move a disk into a different disk encryption set.

    :ivar content: content of the disk.
    """

    disk: Disk
    encryption_set: EncryptionSet
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class AttachDisk:
    """Attach a disk to *domain*, in its definition or in the running instance.

    :ivar encryption_at_host: whether the domain has encryption at host.
    :ivar content: content of the disk.
    """

    disk: Disk
    domain: str
    encryption_at_host: bool = False
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class UnlockDisk:
    """Give a disk's DEKs to the QEMU process of *domain*."""

    disk: Disk
    domain: str


@dataclass(frozen=True, slots=True)
class UpdateVm:
    """Change the properties of a VM.

    :ivar before: present properties; the defaults for a VM new to the store.
    :ivar disks: the VM's managed disks, with their future properties.
    :ivar content: content of all disks of the VM, managed or not.
    """

    domain: str
    before: VmProperties
    after: VmProperties
    disks: tuple[Disk, ...]
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class StartVm:
    """Start a VM with requested properties.

    :ivar disks: the VM's managed disks.
    """

    domain: str
    properties: VmProperties
    disks: tuple[Disk, ...]


Operation = (
    CreateDisk
    | ResizeDisk
    | ExportDisk
    | DeleteDisk
    | CreateEncryptionSet
    | MoveDisk
    | AttachDisk
    | UnlockDisk
    | UpdateVm
    | StartVm
)
