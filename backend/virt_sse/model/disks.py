"""Disks, and the rules for their names, paths and sizes."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from virt_sse.errors import DiskStateError, InvalidValueError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import DekContext, KeyRef
from virt_sse.model.layers import EncryptionType, HostCaching, Placement
from virt_sse.model.sizes import parse_size
from virt_sse.system.files import canonical
from virt_sse.system.rbd_names import RbdName, is_rbd

PLATFORM_KEY = KeyRef("platform-managed", "default")
"""The key of disks outside of any disk encryption set."""

SECTOR = 512
SERIAL_LENGTH = 20
"""Characters of a serial number that virtio-blk shows to guests."""
MAX_SIZE = 64 << 40
"""64 TiB: the largest managed disk of the cloud."""

_UNFIT_FOR_PATH = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML 1.0 or UTF-8 cannot represent."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,78}[A-Za-z0-9_])?")
_IMAGE_NAME_LENGTH = 70
"""Leaves room for the version within the name of a disk."""
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_HINTS = {
    DiskKind.DISK: "see 'virt-sse disk --help'",
    DiskKind.SNAPSHOT: "'virt-sse snapshot restore' makes a disk of a snapshot",
    DiskKind.IMAGE: "'virt-sse disk create --image' makes a disk of an image",
    DiskKind.RESTORE_POINT: "'virt-sse disk restore' makes a disk of a restore point",
}


class DiskState(enum.Enum):
    """Stage of a disk's life. Only ``READY`` disks can be used.

    A ``DELETED`` disk has its image and its wrapped DEKs until it is purged, and can be recovered. A
    ``COPYING`` disk is replaced by another or replaces one (:mod:`virt_sse.model.replacements`): a running
    domain goes on using the source, and no operation but the copy changes either disk. A ``RECEIVING`` disk
    waits for the content of the disk with the id ``source_id``, whose domain is to migrate to another host.
    """

    CREATING = "creating"
    READY = "ready"
    COPYING = "copying"
    RECEIVING = "receiving"
    DELETED = "deleted"
    DELETING = "deleting"

    @property
    def is_at_rest(self) -> bool:
        """Whether no operation on the disk is under way, or was interrupted."""
        return self in (DiskState.READY, DiskState.RECEIVING, DiskState.DELETED)


class DiskSku(enum.Enum):
    """Storage class, by the cloud's names."""

    STANDARD_HDD = "Standard_LRS"
    STANDARD_SSD = "StandardSSD_LRS"
    PREMIUM_SSD = "Premium_LRS"
    PREMIUM_SSD_V2 = "PremiumV2_LRS"
    ULTRA = "UltraSSD_LRS"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk managed by virt-sse.

    :ivar size: usable size, as seen by the guest, in bytes.
    :ivar generation: number of rewraps of the disk's DEKs.
    :ivar deks: the DEK of the guest's LUKS volume first; empty only while the disk is being deleted.
    :ivar set_id: id of the disk encryption set that provides the disk's own key; ``None`` for the
        platform's key.
    :ivar caching: host caching in a domain; ``NONE`` unless the domain has encryption at host.
    :ivar kind: a disk, or a copy that no domain can use.
    :ivar source_id: id of the disk or copy with the original content, if any; may be deleted by now.
    :ivar point: id of a point in time, shared by the snapshots of all disks of a domain.
    :ivar origin_id: id of the first disk in a line of copies that leads to this disk; may be deleted by now.
    :ivar placement: of the disk's encryption set, and of linked clones always ``STORAGE``; ``None`` for the
        host's configured placement.
    :ivar serial: serial number for guests, if not derived from the id: a re-encrypted disk keeps the serial
        number of the disk before.
    :ivar base_id: of an incremental copy or a linked clone: id of the copy below, with the content of all
        clusters that this image does not have.
    :ivar deleted: time of the deletion of a ``DELETED`` disk.
    :ivar scheduled_purge: time from which the agent purges a ``DELETED`` disk.
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
    kind: DiskKind = DiskKind.DISK
    source_id: UUID | None = None
    point: UUID | None = None
    origin_id: UUID | None = None
    placement: Placement | None = None
    serial: str | None = None
    base_id: UUID | None = None
    deleted: datetime | None = None
    scheduled_purge: datetime | None = None

    @property
    def is_linked_clone(self) -> bool:
        """Whether the disk is read from an image where nothing was written yet."""
        return self.base_id is not None and self.kind is DiskKind.DISK

    @property
    def guest_serial(self) -> str:
        """The serial number that guests see."""
        return self.serial or self.id.hex[:SERIAL_LENGTH]

    def dek(self, slot: str) -> DekEntry:
        """The wrapped DEK in *slot*.

        :raise KeyError: When the disk has no such slot.
        """
        for entry in self.deks:
            if entry.slot == slot:
                return entry
        raise KeyError(slot)

    def identity_for(self, slot: str) -> UUID | None:
        """The encryption set whose managed identity may use the KEK of *slot*; ``None`` for the host's own.

        The first layer's key comes from the disk's encryption set, and further layers use the platform's key.
        """
        return self.set_id if slot == self.deks[0].slot else None

    def context(self, slot: str) -> DekContext:
        """The context to which the DEK in *slot* is bound."""
        return DekContext(self.id, slot)

    @property
    def key(self) -> KeyRef:
        """The disk's own key: the KEK of its first layer."""
        key = self.deks[0].wrapped.key
        return KeyRef(key.provider, key.name)

    @property
    def envelope(self) -> Envelope:
        """The copy of the disk's metadata and wrapped DEKs that its image carries."""
        return Envelope(
            disk_id=self.id,
            name=self.name,
            encryption_type=self.encryption_type,
            set_id=self.set_id,
            created=self.created,
            generation=self.generation,
            deks=self.deks,
            kind=self.kind,
            source_id=self.source_id if self.kind is not DiskKind.DISK else None,
            base_id=self.base_id,
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
    :ivar cipher: the cipher of the guest's layer.
    :ivar infrastructure_cipher: the cipher of the second layer, if the set asks for double encryption;
        ``None``: the configured cipher.
    :ivar place: path of the image, or the storage pool to create the image in; ``None``: the configured
        folder.
    :ivar kind: a disk, or a copy that no domain can use.
    :ivar source: the disk or copy with the original content, if any.
    :ivar point: as of :class:`Disk`.
    :ivar id: an id that no disk ever had; ``None``: a new one.
    :ivar base: of an incremental copy or a linked clone: the copy below.
    """

    name: str
    size: int | None = None
    format: DiskFormat = DiskFormat.QCOW2
    sku: DiskSku = DiskSku.PREMIUM_SSD
    encryption_set: str | None = None
    cipher: Cipher = AES_256_XTS
    infrastructure_cipher: Cipher | None = None
    place: Path | StoragePool | None = None
    kind: DiskKind = DiskKind.DISK
    source: Disk | None = None
    point: UUID | None = None
    id: UUID | None = None
    base: Disk | None = None


def check_name(name: str, kind: DiskKind = DiskKind.DISK) -> str:
    """Return *name* if a disk, or a copy of this kind, may have this name.

    The name of an image ends with a colon and the version.

    :raise InvalidValueError: When *name* is invalid.
    """
    base, _, version = name.rpartition(":") if kind is DiskKind.IMAGE else (name, "", "1")
    longest = _IMAGE_NAME_LENGTH if kind is DiskKind.IMAGE else 80
    if not _NAME.fullmatch(base) or len(base) > longest or not _VERSION.fullmatch(version):
        raise InvalidValueError(
            f"invalid {kind.title} name {name[:80]!r}",
            hint=f"1 to {longest} letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return name


def check_kind(disk: Disk, *kinds: DiskKind) -> None:
    """Check that *disk* is of one of *kinds*.

    :raise DiskStateError: When the disk is of another kind.
    """
    if disk.kind not in kinds:
        raise DiskStateError(
            f"{disk.name!r} is no {kinds[0].title}: its kind is {disk.kind.title}", hint=_HINTS.get(disk.kind)
        )


def state_error(disk: Disk) -> DiskStateError:
    """The error that refuses the use of a disk because of its state."""
    problem, hint = f"{disk.kind.title} {disk.name!r} is {disk.state.value}", None
    if disk.state is DiskState.DELETED:
        hint = f"'virt-sse disk recover {disk.name}' makes the disk usable again"
    if disk.state is DiskState.RECEIVING:
        hint = (
            "the disk waits for the migration of a domain; "
            f"if the domain has run with the disk, 'virt-sse disk trust {disk.name}'"
        )
    return DiskStateError(problem, hint=hint)


def taken_hint(name: str, state: DiskState) -> str | None:
    """What to do about a disk whose name or path is wanted by another; ``None`` unless it is deleted."""
    if state is not DiskState.DELETED:
        return None
    return f"disk {name!r} is deleted: 'virt-sse disk recover' recovers it, 'virt-sse disk purge' destroys it"


def check_path(path: Path) -> Path:
    """Return *path* in the canonical form of the store and of domains, if an image may have this path.

    :raise InvalidValueError: When *path* is not UTF-8 or has control characters: domain XML cannot hold it;
        or is a malformed name of an RBD image.
    """
    if _UNFIT_FOR_PATH.search(str(path)):
        raise InvalidValueError(
            f"invalid image path {str(path)[:80]!r}", hint="UTF-8 without control characters"
        )
    return RbdName.of(path).path if is_rbd(path) else canonical(path)


def parse_disk_size(text: str) -> int:
    """Convert the size of a disk, as :func:`~virt_sse.model.sizes.parse_size`.

    :raise InvalidValueError: When *text* is malformed, or a disk cannot have this size.
    """
    return check_size(parse_size(text))


def check_size(size: int) -> int:
    """Return *size* if a disk can have this many bytes.

    :raise InvalidValueError: When *size* is out of range or no multiple of :data:`SECTOR`.
    """
    if not 0 < size <= MAX_SIZE or size % SECTOR:
        raise InvalidValueError(
            f"a disk cannot have {size} bytes", hint=f"a multiple of {SECTOR}, at most {MAX_SIZE >> 40} TiB"
        )
    return size
