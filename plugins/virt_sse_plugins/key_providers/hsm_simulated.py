"""Keys in a PKCS#11 token: KEKs made, used and destroyed inside the token, and never extracted.

The default token is SoftHSM's: hence "simulated". Any PKCS#11 module can be configured.
"""

from __future__ import annotations

import threading
from typing import Self

from virt_sse.api import (
    Dek,
    DekContext,
    InvalidValueError,
    KeyId,
    KeyNotFoundError,
    KeyProvider,
    KeyState,
    ProviderConfig,
    UnwrapError,
    VirtSseError,
    WrappedDek,
)
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.token import KeyKind, TokenKey
from virt_sse.pkcs11.uri import SCHEME, TokenUri
from virt_sse.pkcs11.versions import VersionedKeys, require_strength

RSA_OAEP_256 = "RSA-OAEP-256"
"""RSAES-OAEP with SHA-256, RFC 8017 §7.1, in the words of RFC 7518 §4.3."""

A256KW = "A256KW"
"""AES key wrap, RFC 3394, with a key of 256 bits, in the words of RFC 7518 §4.4."""

_HASH = "sha256"
_ALGORITHMS = {KeyKind.RSA: RSA_OAEP_256, KeyKind.AES: A256KW}


class HsmSimulatedKeyProvider(KeyProvider):
    """Wraps DEKs in a token: by RSA-OAEP-256 or by AES key wrap, depending on the key.

    Wrapping with RSA involves the token, although the public key would suffice: otherwise wrapping would
    still work with a disabled, destroyed or unreachable key.

    An absent token, or a rejected PIN, says nothing about a key: methods then raise
    :class:`~virt_sse.errors.KeyProviderUnavailableError`, or :class:`~virt_sse.errors.ConfigError` when the
    configured module or PIN is unusable.
    """

    name = "hsm-simulated"

    def __init__(self, options: TokenOptions) -> None:
        self._options = options
        self._keys: VersionedKeys | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        return cls(TokenOptions.parse(f"[key-providers.{cls.name}]", config.directory, config.options))

    @classmethod
    def parse_key(cls, text: str) -> tuple[str, str | None]:
        """Parse a label or a PKCS#11 URI. The URI names an object only; the configuration names the token."""
        if not text.startswith(SCHEME):
            return text, None
        uri = TokenUri.parse(text)
        rest = TokenUri(object=uri.object, id=uri.id, type=uri.type)
        if not uri.object or uri != rest or uri.type not in (None, "private", "secret-key"):
            raise InvalidValueError(
                f"{text[:200]!r} is not the PKCS#11 URI of a key by 'object', perhaps with its 'id'",
                hint=f"name the token by 'uri' in [key-providers.{cls.name}]",
            )
        return uri.object, uri.id.hex() if uri.id else None

    def keys(self) -> VersionedKeys:
        """The token's keys.

        :raise KeyProviderUnavailableError: When the token is absent or rejects the PIN.
        """
        with self._lock:
            if self._keys is None:
                self._keys = VersionedKeys(self._options.open())
            return self._keys

    def current_key(self, name: str) -> KeyId:
        return self._id(self.keys().current(name))

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        token = self.keys().token

        def wrap(found: TokenKey) -> bytes:
            require_strength(found)
            if found.kind is KeyKind.RSA:
                return token.oaep_encrypt(found, context.bind(dek), _HASH)
            return token.aes_wrap(found, context.bind(dek))

        algorithm, ciphertext = self.keys().use(
            key.name, key.version, lambda found: (_ALGORITHMS[found.kind], wrap(found))
        )
        return WrappedDek(ciphertext, algorithm, key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        if wrapped.algorithm not in _ALGORITHMS.values():
            raise UnwrapError(
                f"a key of {self.name!r} wraps by {RSA_OAEP_256} or {A256KW}, not by {wrapped.algorithm!r}"
            )
        token, key = self.keys().token, wrapped.key

        def unwrap(found: TokenKey) -> bytes:
            if wrapped.algorithm != _ALGORITHMS[found.kind]:
                raise UnwrapError(f"{key} does not wrap by {wrapped.algorithm}")
            if found.kind is KeyKind.RSA:
                return token.oaep_decrypt(found, wrapped.ciphertext, _HASH)
            return token.aes_unwrap(found, wrapped.ciphertext)

        try:
            payload = self.keys().use(key.name, key.version, unwrap)
        except UnwrapError as exc:
            raise wrapped.damaged(context) from exc
        return context.release(payload)

    def key_state(self, key: KeyId) -> KeyState:
        try:
            keys = self.keys()
            enabled = keys.use(key.name, key.version, keys.token.is_enabled)
        except KeyNotFoundError:
            return KeyState.DELETED
        except VirtSseError:
            return KeyState.UNREACHABLE
        return KeyState.ENABLED if enabled else KeyState.DISABLED

    def rotate(self, name: str) -> KeyId:
        return self._id(self.keys().rotate(name))

    def close(self) -> None:
        with self._lock:
            if self._keys is not None:
                self._keys.token.close()
                self._keys = None

    def _id(self, key: TokenKey) -> KeyId:
        return KeyId(self.name, key.label, key.id.hex())
