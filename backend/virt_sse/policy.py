"""The operations that a policy may refuse, as ``virt_sse_validate`` sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from virt_sse.keys import KeyRef
from virt_sse.layers import EncryptionType

if TYPE_CHECKING:
    from virt_sse.disks import Disk
    from virt_sse.encryption_sets import EncryptionSet
    from virt_sse.qemu.img import DiskFormat


@dataclass(frozen=True, slots=True)
class CreateDisk:
    """A new disk, of *size* bytes; also an import and an adoption."""

    name: str
    size: int
    path: Path
    format: DiskFormat
    encryption_type: EncryptionType
    key: KeyRef


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
    """A disk is put into another disk encryption set."""

    disk: Disk
    encryption_set: EncryptionSet


@dataclass(frozen=True, slots=True)
class AttachDisk:
    """A disk becomes part of the definition, or of the running instance, of *domain*."""

    disk: Disk
    domain: str


@dataclass(frozen=True, slots=True)
class UnlockDisk:
    """A disk's DEKs are about to be given to the QEMU of *domain*."""

    disk: Disk
    domain: str


Operation = (
    CreateDisk
    | ResizeDisk
    | ExportDisk
    | DeleteDisk
    | CreateEncryptionSet
    | MoveDisk
    | AttachDisk
    | UnlockDisk
)
