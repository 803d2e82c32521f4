"""Keys in a token by name and version: the label is the name, the id is the version."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import rsa

from virt_sse.errors import (
    InvalidValueError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderUnavailableError,
)
from virt_sse.pkcs11.objects import RSA_BITS
from virt_sse.pkcs11.token import KeyKind, Token, TokenKey

T = TypeVar("T")

_COUNTER_BYTES = 4
_RANDOM_BYTES = 12


class VersionedKeys:
    """The keys of a token, by name and version, for a key provider.

    A version is the key's id in hexadecimal. The ids made here are a counter followed by random bytes:
    concurrent rotations in several processes make different versions, and all processes agree on the current
    version, which is the highest id as a number. Versions made by other software, with short ids, sort first.

    Methods raise the errors of :class:`Token`.
    """

    def __init__(self, token: Token) -> None:
        self.token = token
        self._known: dict[tuple[str, str], TokenKey] = {}
        self._lock = threading.Lock()

    def all(self) -> list[TokenKey]:
        """All keys with a name and a version, sorted by name, oldest first."""
        return [key for key in self.token.find() if key.label and key.id]

    def versions(self, name: str) -> list[TokenKey]:
        """All versions of a key, oldest first.

        :raise KeyNotFoundError: When the key does not exist.
        """
        found = [key for key in self.token.find(label=name) if key.id] if name else []
        if not found:
            raise KeyNotFoundError(f"the token holds no key {name!r}")
        return found

    def current(self, name: str) -> TokenKey:
        """The version for wrapping new DEKs, enabled or not.

        :raise KeyNotFoundError: When the key does not exist.
        """
        return self.versions(name)[-1]

    def get(self, name: str, version: str) -> TokenKey:
        """A version of a key.

        :raise KeyNotFoundError: When the version does not exist.
        """
        key_id = _parse(version)
        found = self.token.find(label=name, id=key_id) if name and key_id else []
        if not found:
            raise KeyNotFoundError(f"the token holds no version {version!r} of key {name!r}")
        if len(found) > 1:
            raise KeyProviderUnavailableError(
                f"the token holds {len(found)} different keys {name!r} of version {version}"
            )
        return found[0]

    def use(self, name: str, version: str, work: Callable[[TokenKey], T]) -> T:
        """Call *work* with a version of a key, and return its result.

        The version is looked up at first use, and again when *work* does not find the key.

        :raise KeyNotFoundError: When the version does not exist.
        """
        with self._lock:
            known = self._known.get((name, version))
        if known is not None:
            try:
                return work(known)
            except KeyNotFoundError:
                with self._lock:
                    self._known.pop((name, version), None)
        key = self.get(name, version)
        with self._lock:
            self._known[name, version] = key
        return work(key)

    def create(self, name: str, kind: KeyKind, bits: int) -> TokenKey:
        """Make the first version of a key.

        :raise InvalidValueError: When the name is taken, or name, kind or size are invalid.
        """
        self._require_new(name)
        return self._make(name, kind, bits, _next_id([]))

    def bring(self, name: str, private: rsa.RSAPrivateKey) -> TokenKey:
        """Make a private key the first version of a key, by wrapped transfer.

        :raise InvalidValueError: When the name is taken, or name or size are invalid.
        """
        self._require_new(name)
        return self.token.import_rsa(private, name, _next_id([]))

    def rotate(self, name: str) -> TokenKey:
        """Make a new current version, of the same kind and size as the old one.

        :raise KeyNotFoundError: When the key does not exist.
        """
        versions = self.versions(name)
        return self._make(name, versions[-1].kind, versions[-1].bits, _next_id(versions))

    def _make(self, name: str, kind: KeyKind, bits: int, key_id: bytes) -> TokenKey:
        if kind is KeyKind.RSA:
            return self.token.generate_rsa(name, key_id, bits if bits in RSA_BITS else RSA_BITS[0])
        return self.token.generate_aes(name, key_id)

    def _require_new(self, name: str) -> None:
        if self.token.find(label=name):
            raise InvalidValueError(
                f"the token already holds a key {name!r}",
                hint="make a new version with 'virt-sse key rotate'",
            )


def require_strength(key: TokenKey) -> TokenKey:
    """Check the strength of a key made by other software.

    :raise KeyOperationUnsupportedError: When the key is too weak to wrap DEKs.
    """
    if key.bits < (RSA_BITS[0] if key.kind is KeyKind.RSA else 256):
        raise KeyOperationUnsupportedError(f"key {key.label!r} has {key.bits} bits, too few to wrap DEKs")
    return key


def _next_id(versions: list[TokenKey]) -> bytes:
    size = _COUNTER_BYTES + _RANDOM_BYTES
    ours = [int.from_bytes(key.id[:_COUNTER_BYTES], "big") for key in versions if len(key.id) == size]
    counter = max(ours, default=0) + 1
    return counter.to_bytes(_COUNTER_BYTES, "big") + secrets.token_bytes(_RANDOM_BYTES)


def _parse(version: str) -> bytes:
    """The id of a version; empty when *version* is not lowercase hexadecimal."""
    try:
        key_id = bytes.fromhex(version)
    except ValueError:
        return b""
    return key_id if key_id.hex() == version else b""
