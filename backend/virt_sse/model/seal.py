"""The seal: authentication of an envelope and of the LUKS header around the envelope, under the host key.

A checksum shows damage, not forgery. The seal of a slot shows that a host with the host key wrote the slot
into an image with exactly this LUKS header, and counts the writes. Each of the two slots has a seal of 64
bytes in the same gap of the LUKS1 header, at offsets 896 and 960. Big-endian::

    8   use counter, from 1; 0 in an envelope without a seal
    8   id of the host key
    32  HMAC-SHA256 of slot content, header digest and use counter
    16  zero
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import NoReturn, Self

SEAL_OFFSETS = (896, 960)
SEAL_BYTES = 64
HOST_KEY_BYTES = 32

_SEAL = struct.Struct(">Q8s32s16x")
_USES = struct.Struct(">Q")
MAX_USES = 2**63 - 1
"""Limit of the store's column."""
_HASH = "sha256"
_KEY_PURPOSE, _ID_PURPOSE = b"virt-sse envelope seal v1", b"virt-sse host key id v1"
_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class Seal:
    """A seal as found in an image; proves nothing before :meth:`SealKey.verifies`.

    :ivar uses: the use counter.
    :ivar key_id: id of the host key.
    """

    uses: int
    key_id: bytes
    mac: bytes

    def encode(self) -> bytes:
        """The seal, :data:`SEAL_BYTES` long."""
        return _SEAL.pack(self.uses, self.key_id, self.mac)

    @classmethod
    def decode(cls, content: bytes) -> Self | None:
        """Parse a seal; ``None`` without a seal."""
        if len(content) != SEAL_BYTES:
            return None
        uses, key_id, mac = _SEAL.unpack(content)
        return cls(uses, key_id, mac) if 0 < uses <= MAX_USES else None


@dataclass(frozen=True, slots=True, eq=False)
class SealKey:
    """The key of the seals, derived from a host key. Cannot be printed or pickled.

    :ivar id: public; names the host key.
    """

    material: bytes = field(repr=False)
    id: bytes

    @classmethod
    def of_host_key(cls, host_key: bytes) -> Self:
        """Derive the key of the seals from the 32 bytes of a host key."""
        return cls(derived(host_key, _KEY_PURPOSE), derived(host_key, _ID_PURPOSE)[:_ID_BYTES])

    def seal(self, content: bytes, header_digest: bytes, uses: int) -> Seal:
        """Make a seal.

        :param content: prefix and body of the slot.
        :param header_digest: of LUKS header and keyslots, 32 bytes.
        """
        return Seal(uses, self.id, self._mac(content, header_digest, uses))

    def verifies(self, seal: Seal, content: bytes, header_digest: bytes) -> bool:
        """Whether *seal* was made with this key for *content* and *header_digest*."""
        return hmac.compare_digest(seal.mac, self._mac(content, header_digest, seal.uses))

    def _mac(self, content: bytes, header_digest: bytes, uses: int) -> bytes:
        return hmac.digest(self.material, content + header_digest + _USES.pack(uses), _HASH)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key cannot be pickled")


def derived(host_key: bytes, purpose: bytes) -> bytes:
    """Derive a subkey of 32 bytes from the host key: HKDF-SHA256 (RFC 5869) without salt.

    Written out, because importing ``cryptography`` would delay the end of each domain by 20 ms.

    :param purpose: the ``info`` of HKDF; separates the subkeys.
    """
    extracted = hmac.digest(bytes(hashlib.sha256().digest_size), host_key, _HASH)
    return hmac.digest(extracted, purpose + b"\x01", _HASH)
