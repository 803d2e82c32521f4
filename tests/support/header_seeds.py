"""Headers of images of ours without an image: small, made without tools, accepted by the validation."""

from __future__ import annotations

import struct
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.envelope import SLOT_OFFSETS, DekEntry, Envelope
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType

ROOM = 8 << 20
"""Size of the image files in bytes."""

_CLUSTER_BITS = 9
_CLUSTER = 1 << _CLUSTER_BITS
_SECTOR = 512
_KEY_BYTES, _STRIPES = 64, 4000
_KEYSLOT_SECTORS = _KEY_BYTES * _STRIPES // _SECTOR


def luks_header(*, envelope: bytes = b"") -> bytes:
    """A LUKS1 header as cryptsetup writes it, without keyslots' content, up to the first keyslot.

    :param envelope: content of both slots.
    """
    # header of 4096 bytes, then 8 keyslots of 500 sectors each, rounded up to 4096
    first, each = 4096 // _SECTOR, _KEYSLOT_SECTORS + 4
    payload = -(-(first + 7 * each + _KEYSLOT_SECTORS) // 8) * 8
    header = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        *(b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", payload, _KEY_BYTES),
        *(bytes(20), bytes(32), 1000, b"00000000-0000-0000-0000-000000000000"),
    )
    for slot in range(8):
        state = 0x00AC71F3 if slot == 0 else 0x0000DEAD
        header += struct.pack(">II32sII", state, 1000, bytes(32), first + slot * each, _STRIPES)
    content = bytearray(header.ljust(4096, b"\0"))
    for offset in SLOT_OFFSETS if envelope else ():
        content[offset : offset + len(envelope)] = envelope
    return bytes(content)


def luks_length() -> int:
    """Length of header and keyslots of :func:`luks_header`, in bytes."""
    return struct.unpack_from(">I", luks_header(), 104)[0] * _SECTOR


def qcow2_image(*, envelope: bytes = b"", bitmaps: bool = False) -> bytes:
    """The start of a qcow2 image of 1 MiB with a LUKS header, in clusters of 512 bytes."""
    at = 8 * _CLUSTER
    extensions = struct.pack(">IIQQ", 0x0537BE77, 16, at, luks_length())
    extensions += struct.pack(">II", 0x6803F857, 48) + b"\0\0dirty bit".ljust(48, b"\0")
    if bitmaps:
        extensions += struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, 64, 4 * _CLUSTER)
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", 3, 0, 0, _CLUSTER_BITS, 1 << 20, 2, 32, _CLUSTER, 2 * _CLUSTER, 1, 0, 0),
    )
    header += struct.pack(">QQQII", 0, 0, 0, 4, 104) + extensions + bytes(8)
    return header.ljust(at, b"\0") + luks_header(envelope=envelope)


def _envelope(*entries: DekEntry, encryption_type: EncryptionType, set_id: UUID | None) -> Envelope:
    return Envelope(
        disk_id=UUID(int=1),
        name="disk",
        encryption_type=encryption_type,
        set_id=set_id,
        created=datetime(2025, 1, 31, 12, tzinfo=UTC),
        generation=1,
        deks=entries,
    )


_PLATFORM = KeyId("platform-managed", "default", "0" * 32)
_CUSTOMER = KeyId("customer-managed", "https://vault.example:8443/keys/key", "1" * 32)
_INNER = DekEntry("service", AES_256_XTS, WrappedDek(bytes(72), "A256KW", _PLATFORM))
_CUSTOMERS = DekEntry("service", AES_256_XTS, WrappedDek(bytes(256), "RSA-OAEP-256", _CUSTOMER))
_OUTER = DekEntry("infrastructure", AES_256_CBC, WrappedDek(bytes(72), "A256KW", _PLATFORM))

ENVELOPE = (
    _envelope(_INNER, encryption_type=EncryptionType.PLATFORM_KEY, set_id=None),
    _envelope(_CUSTOMERS, encryption_type=EncryptionType.CUSTOMER_KEY, set_id=UUID(int=2)),
    _envelope(
        _CUSTOMERS, _OUTER, encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS, set_id=UUID(int=2)
    ),
)
"""Under the platform key, under a customer key, and under both."""

LARGE_ENVELOPE = _envelope(
    DekEntry(
        "service",
        AES_256_XTS,
        WrappedDek(
            bytes(range(256)) * 2, "RSA-OAEP-256", replace(_CUSTOMER, name=_CUSTOMER.name.ljust(300, "k"))
        ),
    ),
    _OUTER,
    encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    set_id=UUID(int=2),
)
"""Under a key of 4096 bits with a long URL: in version 2 of the format."""
