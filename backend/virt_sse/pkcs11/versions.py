"""Keys in a token by name and version: the label is the name, the id the version."""

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
    """The keys of a token, as a key provider has them.

    A version is its id in hexadecimal. The ids made here are a counter, then random bytes: whoever rotates at
    the same time in another process makes another version, and all agree which of them is current, that
    with the highest id as a number. Versions that others have made, with short ids, come before.

    Methods raise what :class:`Token`'s raise.
    """

    def __init__(self, token: Token) -> None:
        self.token = token
        self._known: dict[tuple[str, str], TokenKey] = {}
        self._lock = threading.Lock()

    def all(self) -> list[TokenKey]:
        """All that have a name and a version; by name, oldest first."""
        return [key for key in self.token.find() if key.label and key.id]

    def versions(self, name: str) -> list[TokenKey]:
        """Those of that name, oldest first.

        :raise KeyNotFoundError: When there are none.
        """
        found = [key for key in self.token.find(label=name) if key.id] if name else []
        if not found:
            raise KeyNotFoundError(f"the token holds no key {name!r}")
        return found

    def current(self, name: str) -> TokenKey:
        """The version that new DEKs are wrapped with, be it enabled or not.

        :raise KeyNotFoundError: When there is none.
        """
        return self.versions(name)[-1]

    def get(self, name: str, version: str) -> TokenKey:
        """:raise KeyNotFoundError: When there is no such version."""
        key_id = _parse(version)
        found = self.token.find(label=name, id=key_id) if name and key_id else []
        if not found:
            raise KeyNotFoundError(f"the token holds no version {version!r} of key {name!r}")
        if len(found) > 1:
            raise KeyProviderUnavailableError(
                f"the token holds {len(found)} keys {name!r} of version {version}, and one is not the other"
            )
        return found[0]

    def use(self, name: str, version: str, work: Callable[[TokenKey], T]) -> T:
        """What *work* makes of that version, which is looked up the first time, and when it was not found.

        :raise KeyNotFoundError: When there is no such version.
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

        :raise InvalidValueError: When there is a key of that name, or name, kind and size make no sense.
        """
        self._require_new(name)
        return self._make(name, kind, bits, _next_id([]))

    def bring(self, name: str, private: rsa.RSAPrivateKey) -> TokenKey:
        """Make a private key the first version of a key, by wrapped transfer.

        :raise InvalidValueError: When there is a key of that name, or name and size make no sense.
        """
        self._require_new(name)
        return self.token.import_rsa(private, name, _next_id([]))

    def rotate(self, name: str) -> TokenKey:
        """Make a new version, like the current one, and make it current.

        :raise KeyNotFoundError: When there is no such key.
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
                f"the token holds a key {name!r} already",
                hint="'virt-sse key rotate' makes a new version of it",
            )


def require_strength(key: TokenKey) -> TokenKey:
    """:raise KeyOperationUnsupportedError: When a key that others have made is too weak for DEKs."""
    if key.bits < (RSA_BITS[0] if key.kind is KeyKind.RSA else 256):
        raise KeyOperationUnsupportedError(f"key {key.label!r} has {key.bits} bits, too few to wrap DEKs")
    return key


def _next_id(versions: list[TokenKey]) -> bytes:
    size = _COUNTER_BYTES + _RANDOM_BYTES
    ours = [int.from_bytes(key.id[:_COUNTER_BYTES], "big") for key in versions if len(key.id) == size]
    counter = max(ours, default=0) + 1
    return counter.to_bytes(_COUNTER_BYTES, "big") + secrets.token_bytes(_RANDOM_BYTES)


def _parse(version: str) -> bytes:
    """The id; empty when *version* is none, in just the one form that it has."""
    try:
        key_id = bytes.fromhex(version)
    except ValueError:
        return b""
    return key_id if key_id.hex() == version else b""
