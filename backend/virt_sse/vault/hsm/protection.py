"""RSA-HSM keys: unextractable in a PKCS#11 token. The database stores only their location.

An answer of the token about a key (disabled, destroyed) is passed on to the client. A token that does not
answer or rejects the PIN says nothing about any key: 503. A missing key is also answered 503 if the vault's
*anchor*, an object that exists only for this check, is missing too: the token was emptied, or cannot read its
object store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cryptography.hazmat.primitives.asymmetric import rsa

from virt_sse.errors import (
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderUnavailableError,
    UnwrapError,
    VirtSseError,
)
from virt_sse.vault.home.sealing import Sealer
from virt_sse.vault.keys.material import KeyMaterial, Protection, PublicKey, binding
from virt_sse.vault.refusals import FailureRefusal, Refusal, bad_parameter, forbidden, key_not_found

if TYPE_CHECKING:
    from virt_sse.pkcs11.objects import TokenKey
    from virt_sse.pkcs11.token import Token

T = TypeVar("T")

ANCHOR = b"anchor"
"""The object id of the anchor; its label is the vault's tag."""

_HASHES = {"RSA-OAEP": "sha1", "RSA-OAEP-256": "sha256"}
_LONGEST_LABEL = 64
_MOST_EXPONENT_BITS = 32
"""The database has room for 63; larger exponents only make encryption slow."""


class HsmRefusal(FailureRefusal):
    """503: the HSM token does not answer or rejects the login."""

    def __init__(self, reason: str) -> None:
        super().__init__("The vault cannot use its HSM now.", f"the vault's HSM failed: {reason}")


class HsmProtection(Protection):
    """Keeps keys in an HSM token. An object's label names vault and key; its id is the key's version.

    :param connect: opens the token; called at first use, and again until a call succeeds.
    :param tag: the vault's prefix of labels.
    :param sealer: seals the handles (label, id, fingerprint) stored in the database.
    """

    key_type = "RSA-HSM"
    outside = True

    def __init__(self, connect: Callable[[], Token], tag: str, sealer: Sealer) -> None:
        self._connect = connect
        self._tag = tag
        self._sealer = sealer
        self._token: Token | None = None
        self._lock = threading.Lock()

    def generate(self, bits: int, name: str, version: str) -> tuple[PublicKey, bytes]:
        return self._make(
            name, version, lambda token: token.generate_rsa(self._label(name), _id(version), bits)
        )

    def import_key(self, private: rsa.RSAPrivateKey, name: str, version: str) -> tuple[PublicKey, bytes]:
        return self._make(
            name, version, lambda token: token.import_rsa(private, self._label(name), _id(version))
        )

    def open(self, stored: bytes, name: str, version: str) -> KeyMaterial:
        handle = json.loads(self._sealer.open(stored, binding(name, version)))
        label, identifier = handle["label"], bytes.fromhex(handle["id"])

        def find(token: Token) -> list[TokenKey]:
            found = token.find(label=label, id=identifier)
            if not found:
                raise KeyNotFoundError("the token has no such key")
            return found

        try:
            found = self.ask(find)
        except KeyNotFoundError as exc:
            raise key_not_found(name, version) from exc
        for key in found:
            if _fingerprint(_public(key)) == handle["n"]:
                return _HsmKey(self, key, name, version)
        raise HsmRefusal(f"key {name}/{version} in the token differs from the key that the vault made there")

    def destroy(self, name: str, version: str) -> None:
        def all_of_them(token: Token) -> None:
            found = token.find(label=self._label(name), id=_id(version))
            if not found:
                self._require_anchor(token)
            for key in found:
                with contextlib.suppress(KeyNotFoundError):  # destroyed by another process meanwhile
                    token.destroy(key)

        try:
            self.ask(all_of_them)
        except KeyOperationUnsupportedError as exc:
            raise HsmRefusal(str(exc)) from exc

    def require(self) -> None:
        self.ask(self._require_anchor)

    def failure(self) -> str | None:
        """Return the reason why the token cannot be used now, or ``None``."""
        try:
            self.require()
        except HsmRefusal as refusal:
            return refusal.detail
        return None

    def ask(self, operation: Callable[[Token], T]) -> T:
        """Run *operation* with the logged-in token.

        :raise KeyNotFoundError: When the token has no such key.
        :raise KeyDisabledError: When the key is disabled in the token.
        :raise UnwrapError: When a ciphertext was not made with the key.
        :raise KeyOperationUnsupportedError: When the token does not support the operation.
        :raise HsmRefusal: When the token does not answer or rejects the login.
        """
        try:
            token = self._opened()
            try:
                return operation(token)
            except KeyNotFoundError:
                self._require_anchor(token)
                raise
        except (KeyNotFoundError, KeyDisabledError, KeyOperationUnsupportedError, UnwrapError):
            raise
        except VirtSseError as exc:
            raise HsmRefusal(str(exc)) from exc

    def close(self) -> None:
        """Log out of the token."""
        with self._lock:
            token, self._token = self._token, None
        if token is not None:
            token.close()

    def _opened(self) -> Token:
        with self._lock:  # one login at a time: concurrent requests must not each try a wrong PIN
            if self._token is None:
                self._token = self._connect()
            return self._token

    def _require_anchor(self, token: Token) -> None:
        if not token.find(label=self._tag, id=ANCHOR):
            raise KeyProviderUnavailableError(f"the token has lost the vault's anchor, {self._tag}")

    def _label(self, name: str) -> str:
        return f"{self._tag}/{name}"[:_LONGEST_LABEL]

    def _make(self, name: str, version: str, make: Callable[[Token], TokenKey]) -> tuple[PublicKey, bytes]:
        try:
            public = _public(self.ask(make))
        except KeyOperationUnsupportedError as exc:
            raise bad_parameter("The vault's HSM does not support such a key.") from exc
        handle = {"label": self._label(name), "id": version, "n": _fingerprint(public)}
        return public, self._sealer.seal(json.dumps(handle).encode(), binding(name, version))


@dataclass(frozen=True, slots=True, eq=False)
class _HsmKey(KeyMaterial):
    protection: HsmProtection
    key: TokenKey
    name: str
    version: str

    @property
    def public(self) -> PublicKey:
        return _public(self.key)

    def decrypt(self, ciphertext: bytes, algorithm: str) -> bytes:
        return self._ask(lambda token: token.oaep_decrypt(self.key, ciphertext, _HASHES[algorithm]))

    def require(self) -> None:
        if not self._ask(lambda token: token.is_enabled(self.key)):
            raise self._disabled()

    def _ask(self, operation: Callable[[Token], T]) -> T:
        try:
            return self.protection.ask(operation)
        except UnwrapError:
            raise bad_parameter("The parameter is incorrect.") from None
        except KeyNotFoundError as exc:
            raise key_not_found(self.name, self.version) from exc
        except KeyDisabledError as exc:
            raise self._disabled() from exc
        except KeyOperationUnsupportedError as exc:
            raise HsmRefusal(str(exc)) from exc

    def _disabled(self) -> Refusal:
        return forbidden("The key is disabled in the HSM.", "KeyDisabled")


def _id(version: str) -> bytes:
    return bytes.fromhex(version)


def _public(key: TokenKey) -> PublicKey:
    """The public half as the token states it, if usable: a refusal here, not a failure at each later use."""
    try:
        numbers = key.public_key.public_numbers()
    except ValueError as exc:
        raise HsmRefusal(f"the token states an impossible RSA key: {exc}") from exc
    if numbers.e.bit_length() > _MOST_EXPONENT_BITS:
        raise HsmRefusal(f"the token states an RSA exponent of {numbers.e.bit_length()} bits")
    return PublicKey(numbers.n, numbers.e)


def _fingerprint(public: PublicKey) -> str:
    return hashlib.sha256(f"{public.n:x}/{public.e:x}".encode()).hexdigest()
