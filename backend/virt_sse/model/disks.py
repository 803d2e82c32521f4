"""Disks: what they are, and what their names and sizes may be."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from virt_sse.errors import InvalidValueError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import DekContext, KeyRef
from virt_sse.model.layers import EncryptionType, HostCaching
from virt_sse.system.files import canonical

PLATFORM_KEY = KeyRef("platform-managed", "default")
"""What a disk is under that is in no encryption set."""

SECTOR = 512
MAX_SIZE = 64 << 40
"""64 TiB, the cloud's largest disk."""

_UNFIT_FOR_PATH = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What XML cannot hold, or is not UTF-8."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,78}[A-Za-z0-9_])?")
_SIZE = re.compile(r"([0-9]{1,20})(?:([KMGT])(?:iB)?)?")
_UNITS = {None: 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class DiskState(enum.Enum):
    """Where a disk is in its life. Only ``READY`` ones can be used."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class DiskSku(enum.Enum):
    """The kind of storage, in the cloud's words. A revocation leaves a domain with an ultra disk running."""

    STANDARD_HDD = "Standard_LRS"
    STANDARD_SSD = "StandardSSD_LRS"
    PREMIUM_SSD = "Premium_LRS"
    ULTRA = "UltraSSD_LRS"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of ours.

    :ivar size: what the guest sees, in bytes.
    :ivar generation: counts the rewraps of its DEKs.
    :ivar set_id: the disk's encryption set; ``None``: the disk is under the platform's key.
    :ivar caching: what the host caches of it in a domain; not ``NONE`` only with encryption at host.
    """

    id: UUID
    name: str
    path: Path
    format: DiskFormat
    size: int
    state: DiskState
    encryption_type: EncryptionType
    created: datetime
    generation: int
    deks: tuple[DekEntry, ...]
    sku: DiskSku = DiskSku.PREMIUM_SSD
    set_id: UUID | None = None
    caching: HostCaching = HostCaching.NONE

    def dek(self, slot: str) -> DekEntry:
        """The wrapped DEK in *slot*.

        :raise KeyError: When the disk has no such slot.
        """
        for entry in self.deks:
            if entry.slot == slot:
                return entry
        raise KeyError(slot)

    def identity_for(self, slot: str) -> UUID | None:
        """The encryption set with whose identity the KEK of a slot's DEK is used; ``None``: the host's own.

        The disk's own key is its set's. Another layer's is the platform's.
        """
        return self.set_id if slot == self.deks[0].slot else None

    def context(self, slot: str) -> DekContext:
        """What the DEK in *slot* is bound to."""
        return DekContext(self.id, slot)

    @property
    def key(self) -> KeyRef:
        """The disk's own key, the one of its first layer."""
        key = self.deks[0].wrapped.key
        return KeyRef(key.provider, key.name)

    @property
    def envelope(self) -> Envelope:
        """What its image carries of it."""
        return Envelope(
            disk_id=self.id,
            name=self.name,
            encryption_type=self.encryption_type,
            set_id=self.set_id,
            created=self.created,
            generation=self.generation,
            deks=self.deks,
        )


@dataclass(frozen=True, slots=True)
class StoragePool:
    """A libvirt storage pool of type ``dir``, ``fs`` or ``netfs``, as the place of a new disk."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDisk:
    """A disk to be created.

    :ivar size: in bytes; ``None`` in an import: the size of the imported image.
    :ivar encryption_set: name or id of the disk encryption set; ``None``: under the platform's key.
    :ivar infrastructure_cipher: the cipher of the second layer, if the set asks for double encryption;
        ``None``: the configured cipher.
    :ivar place: path of the image, or the storage pool to create the image in; ``None``: the configured
        folder.
    """

    name: str
    size: int | None = None
    format: DiskFormat = DiskFormat.QCOW2
    sku: DiskSku = DiskSku.PREMIUM_SSD
    encryption_set: str | None = None
    infrastructure_cipher: Cipher | None = None
    place: Path | StoragePool | None = None


def check_name(name: str) -> str:
    """*name*, if a disk may be called so.

    :raise InvalidValueError: When it may not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{name[:80]!r} is no disk name",
            hint="1 to 80 letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return name


def check_path(path: Path) -> Path:
    """*path* as the store and domains name it, if an image may lie there.

    :raise InvalidValueError: When a domain's XML cannot hold it: not UTF-8, or with control characters.
    """
    if _UNFIT_FOR_PATH.search(str(path)):
        raise InvalidValueError(
            f"{str(path)[:80]!r} is no path for an image", hint="no control characters, and UTF-8"
        )
    return canonical(path)


def parse_size(text: str) -> int:
    """Bytes of ``10G``, ``512MiB`` or ``1073741824``; the units are binary, as in qemu-img.

    :raise InvalidValueError: When it is no size that a disk can have.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise InvalidValueError(
            f"{text[:40]!r} is no size", hint="a number of bytes, or a number with K, M, G or T, e.g. 10G"
        )
    return check_size(int(match[1]) * _UNITS[match[2]])


def check_size(size: int) -> int:
    """*size*, if a disk can have so many bytes.

    :raise InvalidValueError: When it cannot.
    """
    if not 0 < size <= MAX_SIZE or size % SECTOR:
        raise InvalidValueError(
            f"a disk cannot have {size} bytes", hint=f"a multiple of {SECTOR}, at most {MAX_SIZE >> 40} TiB"
        )
    return size
