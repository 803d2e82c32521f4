"""The vault's root key, and encryption with keys derived from the root key."""

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
"""The purposes of sealing; TOKENS is for the signing key of access tokens."""

_NONCE_BYTES = 12
_FORMAT = b"\x01"


@dataclass(frozen=True, slots=True, eq=False)
class VaultRootKey:
    """32 random bytes. Every secret in the vault's database is sealed under keys derived from them.

    :ivar vault: the vault's tenant and name, part of the key derivation: each vault has other derived keys.
    """

    material: bytes = field(repr=False)
    vault: str

    def __post_init__(self) -> None:
        if len(self.material) != ROOT_KEY_BYTES:
            raise VaultError(f"a vault's root key has {ROOT_KEY_BYTES} bytes, not {len(self.material)}")

    def sealer(self, purpose: str) -> Sealer:
        """Derive the sealer for a *purpose*; sealers of different purposes cannot open each other's data."""
        derived = HKDF(
            hashes.SHA256(),
            ROOT_KEY_BYTES,
            salt=None,
            info=f"virt-sse vault v1\0{self.vault}\0{purpose}".encode(),
        ).derive(self.material)
        return Sealer(AESGCM(derived))


@dataclass(frozen=True, slots=True, eq=False)
class Sealer:
    """AES-256-GCM with random nonces. Format: version byte, nonce, ciphertext, authentication tag."""

    _cipher: AESGCM = field(repr=False)

    def seal(self, plaintext: bytes, context: bytes) -> bytes:
        """Encrypt *plaintext* and bind the result to *context*."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, plaintext, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt data sealed for *context*.

        :raise VaultError: When the data was altered, or sealed for another context or under another root key.
        """
        nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        if sealed[:1] != _FORMAT or len(ciphertext) < 16:
            raise VaultError("not sealed by this vault")
        try:
            return self._cipher.decrypt(nonce, ciphertext, context)
        except InvalidTag as exc:
            raise VaultError("not sealed by this vault, or not sealed for this purpose") from exc
