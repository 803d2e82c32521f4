"""The envelope: format of the wrapped DEKs that a disk's own image carries.

The LUKS1 header has a gap between its fields (592) and the first keyslot (4096), never written by QEMU or
cryptsetup. The gap holds two slots of 1,536 bytes, at offsets 1024 and 2560. Each slot contains, big-endian::

    8   magic "virt-sse"
    2   format version, 1 or 2
    2   length of the body
    8   generation
    n   body: JSON in version 1; MessagePack in version 2, written where JSON has no room
    32  SHA-256 of everything before

The valid slot with the highest use counter (:mod:`virt_sse.model.seal`) and generation is current. A write
replaces the other slot first, makes the write durable, and then replaces the current slot: a torn write
leaves a valid slot, and a complete write leaves no copy of the old content.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct
from dataclasses import dataclass
from datetime import datetime
from typing import Self
from uuid import UUID

import msgspec

from virt_sse.errors import EnvelopeError, InvalidValueError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType
from virt_sse.system.documents import from_json, from_messagepack

SLOT_OFFSETS = (1024, 2560)
SLOT_BYTES = 1536

_MAGIC = b"virt-sse"
_JSON_VERSION, _MESSAGEPACK_VERSION = 1, 2
_PREFIX = struct.Struct(">8sHHQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_GENERATION = 2**31 - 1
"""Limit of the store's column."""
_BODY_BYTES = SLOT_BYTES - _PREFIX.size - _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class DekEntry:
    """A wrapped DEK of a disk.

    :ivar slot: name of the DEK within the disk; part of the wrapped DEK's context, with the disk's id.
    :ivar cipher: cipher of the LUKS volume unlocked by the DEK.
    """

    slot: str
    cipher: Cipher
    wrapped: WrappedDek


@dataclass(frozen=True, slots=True)
class Envelope:
    """Everything needed, apart from the key provider, to use a disk whose store is lost.

    :ivar set_id: id of the disk's disk encryption set, if any.
    :ivar generation: number of rewraps.
    :ivar kind: a disk, or a copy that no domain can use.
    :ivar source_id: of a copy: id of the disk or copy with the original content.
    :ivar base_id: of an incremental copy or a linked clone: id of the copy below.
    """

    disk_id: UUID
    name: str
    encryption_type: EncryptionType
    set_id: UUID | None
    created: datetime
    generation: int
    deks: tuple[DekEntry, ...]
    kind: DiskKind = DiskKind.DISK
    source_id: UUID | None = None
    base_id: UUID | None = None

    def has_same_keys(self, other: Envelope) -> bool:
        """Whether *other* has the same layers, wrapped DEKs and generation.

        Each host chooses name and encryption set of a shared image's disk.
        """
        return (self.disk_id, self.encryption_type, self.generation, self.deks) == (
            other.disk_id,
            other.encryption_type,
            other.generation,
            other.deks,
        )

    def encode(self) -> bytes:
        """The content of a slot, :data:`SLOT_BYTES` long.

        :raise EnvelopeError: When the body does not fit.
        """
        version, body = _JSON_VERSION, msgspec.json.encode(_Body.of(self))
        if len(body) > _BODY_BYTES:  # earlier versions of virt-sse know JSON alone
            version, body = _MESSAGEPACK_VERSION, msgspec.msgpack.encode(_DenseBody.of(self))
        if len(body) > _BODY_BYTES:
            raise EnvelopeError(
                f"names and wrapped DEKs of disk {self.name!r} take {len(body)} bytes;"
                f" the image's header has room for {_BODY_BYTES}",
                hint="use a key with a shorter name or URL, or with fewer bits",
            )
        content = _PREFIX.pack(_MAGIC, version, len(body), self.generation) + body
        return (content + hashlib.sha256(content).digest()).ljust(SLOT_BYTES, b"\0")

    @classmethod
    def decode(cls, slot: bytes) -> Self:
        """Parse a slot.

        :raise EnvelopeError: When the slot is empty, truncated, altered, malformed or of an unknown version.
        """
        if len(slot) < _PREFIX.size or not slot.startswith(_MAGIC):
            raise EnvelopeError("no envelope: not a disk of virt-sse")
        _, version, length, generation = _PREFIX.unpack_from(slot)
        if version not in (_JSON_VERSION, _MESSAGEPACK_VERSION):
            raise EnvelopeError(
                f"an envelope of version {version}; this virt-sse knows version {_MESSAGEPACK_VERSION}"
            )
        end = _PREFIX.size + length
        if not hmac.compare_digest(hashlib.sha256(slot[:end]).digest(), slot[end : end + _DIGEST_BYTES]):
            raise EnvelopeError("the envelope is damaged")
        # The checksum is no signature: the body is untrusted, written by anyone with access to the image.
        try:
            if not 0 < generation <= _MAX_GENERATION:
                raise ValueError(f"generation {generation}")
            body: _Body | _DenseBody
            if version == _JSON_VERSION:
                body = from_json(slot[_PREFIX.size : end], _Body)
            else:
                body = from_messagepack(slot[_PREFIX.size : end], _DenseBody)
            return cls(
                disk_id=_uuid(body.disk),
                name=body.name,
                encryption_type=body.encryption_type,
                set_id=_uuid(body.encryption_set) if body.encryption_set else None,
                created=datetime.fromisoformat(body.created),
                generation=generation,
                deks=tuple(entry.decoded() for entry in body.deks),
                kind=body.kind,
                source_id=_uuid(body.source) if body.source else None,
                base_id=_uuid(body.base) if body.base else None,
            )
        except (ValueError, InvalidValueError) as exc:
            raise EnvelopeError(f"invalid envelope: {exc}") from exc


def sealed_part(slot: bytes) -> bytes:
    """The part of a slot authenticated by its seal: prefix and body."""
    if len(slot) < _PREFIX.size:
        return slot
    _, _, length, _ = _PREFIX.unpack_from(slot)
    return slot[: _PREFIX.size + length]


class _Dek(msgspec.Struct, frozen=True):
    """A :class:`DekEntry` in JSON.

    :ivar key: provider, name and version of the KEK.
    :ivar dek: ciphertext, base64.
    """

    slot: str
    cipher: str
    key: tuple[str, str, str]
    alg: str
    dek: str

    @classmethod
    def of(cls, entry: DekEntry) -> Self:
        wrapped = entry.wrapped
        return cls(
            slot=entry.slot,
            cipher=str(entry.cipher),
            key=(wrapped.key.provider, wrapped.key.name, wrapped.key.version),
            alg=wrapped.algorithm,
            dek=base64.b64encode(wrapped.ciphertext).decode(),
        )

    def decoded(self) -> DekEntry:
        return DekEntry(
            slot=self.slot,
            cipher=Cipher.parse(self.cipher),
            wrapped=WrappedDek(
                ciphertext=base64.b64decode(self.dek, validate=True),
                algorithm=self.alg,
                key=KeyId(*self.key),
            ),
        )


class _Body(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """An :class:`Envelope` in JSON. Unknown fields are ignored: a later virt-sse may add some.

    The order of the fields is their order in the encoded envelope.
    """

    disk: str
    name: str
    encryption_type: EncryptionType
    created: str
    encryption_set: str | None = None
    deks: tuple[_Dek, ...]
    kind: DiskKind = DiskKind.DISK
    source: str | None = None
    base: str | None = None

    @classmethod
    def of(cls, envelope: Envelope) -> Self:
        return cls(
            disk=str(envelope.disk_id),
            name=envelope.name,
            encryption_type=envelope.encryption_type,
            created=envelope.created.isoformat(),
            encryption_set=str(envelope.set_id) if envelope.set_id else None,
            deks=tuple(_Dek.of(entry) for entry in envelope.deks),
            kind=envelope.kind,
            source=str(envelope.source_id) if envelope.source_id else None,
            base=str(envelope.base_id) if envelope.base_id else None,
        )


class _DenseDek(msgspec.Struct, frozen=True):
    """A :class:`DekEntry` in MessagePack: as :class:`_Dek`, with the ciphertext as bytes."""

    slot: str
    cipher: str
    key: tuple[str, str, str]
    alg: str
    dek: bytes

    @classmethod
    def of(cls, entry: DekEntry) -> Self:
        wrapped = entry.wrapped
        return cls(
            slot=entry.slot,
            cipher=str(entry.cipher),
            key=(wrapped.key.provider, wrapped.key.name, wrapped.key.version),
            alg=wrapped.algorithm,
            dek=wrapped.ciphertext,
        )

    def decoded(self) -> DekEntry:
        wrapped = WrappedDek(ciphertext=self.dek, algorithm=self.alg, key=KeyId(*self.key))
        return DekEntry(slot=self.slot, cipher=Cipher.parse(self.cipher), wrapped=wrapped)


class _DenseBody(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """An :class:`Envelope` in MessagePack: as :class:`_Body`, with ids and ciphertexts as bytes."""

    disk: bytes
    name: str
    encryption_type: EncryptionType
    created: str
    encryption_set: bytes | None = None
    deks: tuple[_DenseDek, ...]
    kind: DiskKind = DiskKind.DISK
    source: bytes | None = None
    base: bytes | None = None

    @classmethod
    def of(cls, envelope: Envelope) -> Self:
        return cls(
            disk=envelope.disk_id.bytes,
            name=envelope.name,
            encryption_type=envelope.encryption_type,
            created=envelope.created.isoformat(),
            encryption_set=envelope.set_id.bytes if envelope.set_id else None,
            deks=tuple(_DenseDek.of(entry) for entry in envelope.deks),
            kind=envelope.kind,
            source=envelope.source_id.bytes if envelope.source_id else None,
            base=envelope.base_id.bytes if envelope.base_id else None,
        )


def _uuid(value: str | bytes) -> UUID:
    return UUID(bytes=value) if isinstance(value, bytes) else UUID(value)
