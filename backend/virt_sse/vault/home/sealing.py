"""The vault's root key, and what lies under it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from virt_sse.errors import VaultError

ROOT_KEY_BYTES = 32
KEYS, BACKUPS, TOKENS = "keys", "backups", "tokens"
"""For what purposes the vault seals."""

_NONCE_BYTES = 12
_FORMAT = b"\x01"


@dataclass(frozen=True, slots=True, eq=False)
class VaultRootKey:
    """32 random bytes. Everything secret that the vault stores is sealed under keys derived from them.

    :ivar vault: the vault's tenant and name; keys derived for one vault open nothing of another.
    """

    material: bytes = field(repr=False)
    vault: str

    def __post_init__(self) -> None:
        if len(self.material) != ROOT_KEY_BYTES:
            raise VaultError(f"a vault's root key has {ROOT_KEY_BYTES} bytes, not {len(self.material)}")

    def sealer(self, purpose: str) -> Sealer:
        """What seals for one *purpose*; what it has sealed does not open for another."""
        derived = HKDF(
            hashes.SHA256(),
            ROOT_KEY_BYTES,
            salt=None,
            info=f"virt-sse vault v1\0{self.vault}\0{purpose}".encode(),
        ).derive(self.material)
        return Sealer(AESGCM(derived))


@dataclass(frozen=True, slots=True, eq=False)
class Sealer:
    """AES-256-GCM with random nonces. A form byte, the nonce, then ciphertext and tag."""

    _cipher: AESGCM = field(repr=False)

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """*plaintext*, encrypted and bound to *context*."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, plaintext, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed for *context*.

        :raise VaultError: When it was altered, or sealed for another context or under another root key.
        """
        nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        if sealed[:1] != _FORMAT or len(ciphertext) < 16:
            raise VaultError("not something that this vault has sealed")
        try:
            return self._cipher.decrypt(nonce, ciphertext, context)
        except InvalidTag as exc:
            raise VaultError("not something that this vault has sealed for this purpose") from exc
