"""The operations that a policy may refuse, as ``virt_sse_validate`` sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Where operations take place: all disks and VMs of one host are in one region.

    :ivar tables: the site's own file of what is supported where, if it has one.
    :ivar enforce: whether the rules of a cloud hold here.
    """

    subscription: str = "default"
    region: str = "default"
    tables: Path | None = None
    enforce: bool = True


@dataclass(frozen=True, slots=True)
class CreateDisk:
    """A new disk, of *size* bytes; also an import and an adoption.

    :ivar content: what it is to hold; ``None`` for an empty disk.
    """

    name: str
    size: int
    path: Path
    format: DiskFormat
    encryption_type: EncryptionType
    key: KeyRef
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class ResizeDisk:
    """A disk's size in bytes becomes *size*."""

    disk: Disk
    size: int


@dataclass(frozen=True, slots=True)
class ExportDisk:
    """A disk's content is written, in plaintext, to *destination*."""

    disk: Disk
    destination: Path


@dataclass(frozen=True, slots=True)
class DeleteDisk:
    """A disk is erased for good."""

    disk: Disk


@dataclass(frozen=True, slots=True)
class CreateEncryptionSet:
    """A new disk encryption set."""

    encryption_set: EncryptionSet


@dataclass(frozen=True, slots=True)
class MoveDisk:
    """A disk is put into another disk encryption set.

    :ivar content: what it holds.
    """

    disk: Disk
    encryption_set: EncryptionSet
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class AttachDisk:
    """A disk becomes part of the definition, or of the running instance, of *domain*.

    :ivar encryption_at_host: whether the domain has it.
    :ivar content: what the disk holds.
    """

    disk: Disk
    domain: str
    encryption_at_host: bool = False
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class UnlockDisk:
    """A disk's DEKs are about to be given to the QEMU of *domain*."""

    disk: Disk
    domain: str


@dataclass(frozen=True, slots=True)
class UpdateVm:
    """A VM is to be another than before.

    :ivar before: all defaults for one that is not known yet.
    :ivar disks: of ours, those that it has, as they are to be.
    :ivar content: what all its disks hold, ours or not.
    """

    domain: str
    before: VmProperties
    after: VmProperties
    disks: tuple[Disk, ...]
    content: Content | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class StartVm:
    """A VM that something was asked of is about to start.

    :ivar disks: of ours, those that it has.
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
