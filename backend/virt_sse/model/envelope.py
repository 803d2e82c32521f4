"""The envelope: a disk's wrapped DEKs as they lie in its own image.

In the gap of the LUKS1 header between its fields (592) and the first keyslot (4096), which neither QEMU nor
cryptsetup ever writes, are two slots of 1,536 bytes, at 1024 and 2560. Each holds, big-endian::

    8   magic "virt-sse"
    2   format version, 1
    2   length of the body
    8   generation
    n   body: JSON, UTF-8
    32  SHA-256 of all before

The valid slot of the highest generation counts. A write replaces the other slot first, makes that durable,
and then this one: a torn write leaves one whole, and a finished one leaves no copy of what was replaced.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from virt_sse.errors import EnvelopeError, InvalidValueError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType

SLOT_OFFSETS = (1024, 2560)
SLOT_BYTES = 1536

_MAGIC = b"virt-sse"
_VERSION = 1
_PREFIX = struct.Struct(">8sHHQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAX_GENERATION = 2**31 - 1
"""What the store's column holds."""
_BODY_BYTES = SLOT_BYTES - _PREFIX.size - _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class DekEntry:
    """One wrapped DEK of a disk.

    :ivar slot: its name within the disk; with the disk's id what it is bound to.
    :ivar cipher: what the LUKS volume that it unlocks encrypts with.
    """

    slot: str
    cipher: Cipher
    wrapped: WrappedDek


@dataclass(frozen=True, slots=True)
class Envelope:
    """All that is needed, beside the key provider, to use a disk whose store is lost.

    :ivar set_id: the disk's encryption set.
    :ivar generation: counts the rewraps.
    """

    disk_id: UUID
    name: str
    encryption_type: EncryptionType
    set_id: UUID | None
    created: datetime
    generation: int
    deks: tuple[DekEntry, ...]

    def encode(self) -> bytes:
        """One slot's content, :data:`SLOT_BYTES` long.

        :raise EnvelopeError: When it does not fit.
        """
        body = json.dumps(
            {
                "disk": str(self.disk_id),
                "name": self.name,
                "encryption-type": self.encryption_type.value,
                "created": self.created.isoformat(),
                **({"encryption-set": str(self.set_id)} if self.set_id else {}),
                "deks": [_dek_to_json(entry) for entry in self.deks],
            },
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode()
        if len(body) > _BODY_BYTES:
            raise EnvelopeError(
                f"the wrapped DEKs take {len(body)} bytes; the header has room for {_BODY_BYTES}"
            )
        content = _PREFIX.pack(_MAGIC, _VERSION, len(body), self.generation) + body
        return (content + hashlib.sha256(content).digest()).ljust(SLOT_BYTES, b"\0")

    @classmethod
    def decode(cls, slot: bytes) -> Envelope:
        """Read one slot.

        :raise EnvelopeError: When it is empty, truncated, altered, or of a version that is not known here.
        """
        if len(slot) < _PREFIX.size or not slot.startswith(_MAGIC):
            raise EnvelopeError("no envelope: not a disk of virt-sse")
        _, version, length, generation = _PREFIX.unpack_from(slot)
        if version != _VERSION:
            raise EnvelopeError(f"an envelope of version {version}; this virt-sse knows version {_VERSION}")
        end = _PREFIX.size + length
        if not hmac.compare_digest(hashlib.sha256(slot[:end]).digest(), slot[end : end + _DIGEST_BYTES]):
            raise EnvelopeError("the envelope is damaged")
        # The checksum is no signature: whoever can write to the image can have put anything here.
        try:
            if not 0 < generation <= _MAX_GENERATION:
                raise ValueError(f"generation {generation}")
            body = json.loads(slot[_PREFIX.size : end])
            return cls(
                disk_id=UUID(_text(body["disk"])),
                name=_text(body["name"]),
                encryption_type=EncryptionType(body["encryption-type"]),
                set_id=UUID(body["encryption-set"]) if body.get("encryption-set") else None,
                created=datetime.fromisoformat(_text(body["created"])),
                generation=generation,
                deks=tuple(_dek_from_json(entry) for entry in body["deks"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError, InvalidValueError) as exc:
            raise EnvelopeError(f"the envelope makes no sense: {exc}") from exc


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # a ValueError for half a surrogate pair, which JSON can spell
    return value


def _dek_to_json(entry: DekEntry) -> dict[str, object]:
    key = entry.wrapped.key
    return {
        "slot": entry.slot,
        "cipher": str(entry.cipher),
        "key": [key.provider, key.name, key.version],
        "alg": entry.wrapped.algorithm,
        "dek": base64.b64encode(entry.wrapped.ciphertext).decode(),
    }


def _dek_from_json(entry: dict[str, object]) -> DekEntry:
    provider, name, version = (_text(part) for part in entry["key"])  # type: ignore[attr-defined] # TypeError above
    return DekEntry(
        slot=_text(entry["slot"]),
        cipher=Cipher.parse(_text(entry["cipher"])),
        wrapped=WrappedDek(
            ciphertext=base64.b64decode(_text(entry["dek"]), validate=True),
            algorithm=_text(entry["alg"]),
            key=KeyId(provider, name, version),
        ),
    )
