"""Customer-managed keys: KEKs stored and used only inside a key vault, virt-sse's own or Azure's."""

from __future__ import annotations

import base64
import binascii
import threading
import uuid
from collections.abc import Mapping
from typing import Self

from virt_sse.api import (
    Dek,
    DekContext,
    InvalidValueError,
    KeyDeniedError,
    KeyId,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProvider,
    KeyProviderUnavailableError,
    KeyState,
    ProviderConfig,
    UnwrapError,
    VirtSseError,
    WrappedDek,
    current_correlation,
)
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey, is_key_version
from virt_sse_plugins.key_providers.key_vault import UnacceptableError
from virt_sse_plugins.key_providers.key_vault_addresses import AddressedKeyVault
from virt_sse_plugins.key_providers.key_vault_options import KeyVaultOptions

ALGORITHM = "RSA-OAEP-256"
"""RSAES-OAEP with SHA-256, RFC 8017 §7.1, in the words of RFC 7518 §4.3."""

_ALGORITHMS = (ALGORITHM, "RSA-OAEP")
_READING = "reading of the key"
_KEY_TYPES = ("RSA", "RSA-HSM")
_KEY_BITS = (2048, 3072, 4096)
_CIPHERTEXT_LENGTHS = (256, 384, 512)
"""Lengths in bytes, for the sizes of RSA keys in key vaults."""


class CustomerManagedKeyProvider(KeyProvider):
    """Wraps DEKs by RSA-OAEP-256 in a key vault, with one identity.

    The name of a key is its URL without a version. Wrapping involves the vault, although the public key would
    suffice: this way the vault can refuse a revoked key, and audits each wrap.

    Every method but :meth:`from_config` and :meth:`key_state` raises, in addition to the contract's errors,
    :class:`~virt_sse.errors.KeyDeniedError` when the vault refuses the identity, or when the identity is not
        meant for this vault (no request is sent then), and
        :class:`~virt_sse.errors.KeyProviderUnavailableError` when the vault does not answer, or answers
        unlike a key vault.
    """

    name = "customer-managed"

    def __init__(self, options: KeyVaultOptions) -> None:
        self._options = options
        self._access = options.access()
        self._vaults: dict[str, AddressedKeyVault] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        return cls(KeyVaultOptions.parse(cls.name, config))

    @classmethod
    def parse_key(cls, text: str) -> tuple[str, str | None]:
        key = KeyVaultKey.parse(text)
        return key.url, key.version

    @classmethod
    def needs_identity(cls, config: ProviderConfig) -> bool:
        return config.options.get("credential", "identity") == "identity"

    def current_key(self, name: str) -> KeyId:
        key = _parse(name)
        document = self._vault(key).ask(_READING, key, "GET", headers=_headers())
        material = _table(document, "key")
        version = _version(key, material.get("kid"))
        _check_kind(key, material)
        return KeyId(self.name, name, version)

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        ciphertext = self._use("wrap", key, ALGORITHM, context.bind(dek), context)
        if len(ciphertext) not in _CIPHERTEXT_LENGTHS:  # unwrapping would fail
            raise _senseless()
        return WrappedDek(ciphertext, ALGORITHM, key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        if wrapped.algorithm not in _ALGORITHMS:
            raise UnwrapError(f"a key of {self.name!r} wraps by {ALGORITHM}, not by {wrapped.algorithm!r}")
        if len(wrapped.ciphertext) > max(_CIPHERTEXT_LENGTHS):
            raise UnwrapError(f"a wrapped DEK of {len(wrapped.ciphertext)} bytes does not fit an RSA key")
        try:
            payload = self._use("unwrap", wrapped.key, wrapped.algorithm, wrapped.ciphertext, context)
        except UnacceptableError as exc:
            raise wrapped.damaged(context, exc) from exc
        return context.release(payload)

    def key_state(self, key: KeyId) -> KeyState:
        """The state of a version.

        ``UNREACHABLE`` when the vault does not answer, or when the identity is not meant for this vault (no
        request is sent then).
        """
        try:
            located = _parse_version(key)
            if not self._access.covers(located.vault_url):
                return KeyState.UNREACHABLE
            return self._state(located)
        except VirtSseError as exc:
            return KeyState.of_error(exc)

    def rotate(self, name: str) -> KeyId:
        """Make a new version of the key, if the vault permits.

        :raise KeyDeniedError: When the identity lacks permission; usual, since the key's administrator
            rotates.
        """
        key = _parse(name)
        vault = self._vault(key)
        try:
            document = vault.ask("rotation", key, "POST", "rotate", headers=_headers(), repeatable=False)
        except KeyDeniedError as exc:
            raise KeyDeniedError(str(exc), hint="rotation is a task of the key's administrator") from exc
        return KeyId(self.name, name, _version(key, _table(document, "key").get("kid")))

    def close(self) -> None:
        with self._lock:
            for vault in self._vaults.values():
                vault.close()
        self._access.close()

    def _use(self, what: str, key: KeyId, algorithm: str, value: bytes, context: DekContext) -> bytes:
        located = _parse_version(key)
        document = self._vault(located).ask(
            what,
            located,
            "POST",
            f"{what}key",
            body={"alg": algorithm, "value": base64.urlsafe_b64encode(value).rstrip(b"=").decode()},
            headers=_headers() | {"x-virt-sse-disk": str(context.disk_id)},
        )
        _version(located, document.get("kid"))
        return _bytes(document.get("value"))

    def _state(self, key: KeyVaultKey) -> KeyState:
        document = self._vault(key).ask(_READING, key, "GET", headers=_headers())
        material, enabled = _table(document, "key"), _table(document, "attributes").get("enabled")
        _version(key, material.get("kid"))
        if not isinstance(enabled, bool):
            raise _senseless()
        if not enabled:
            return KeyState.DISABLED
        operations = material.get("key_ops")
        if isinstance(operations, list) and "unwrapKey" not in operations:
            return KeyState.DENIED
        return KeyState.ENABLED

    def _vault(self, key: KeyVaultKey) -> AddressedKeyVault:
        """The vault of a key.

        :raise KeyDeniedError: When the identity is not meant for the key's vault.
        """
        if not self._access.covers(key.vault_url):
            raise KeyDeniedError(
                f"{self._access.who()} is not meant for the key vault {key.vault_url}",
                hint=self._access.hint(),
            )
        with self._lock:
            if key.vault_url not in self._vaults:
                self._vaults[key.vault_url] = AddressedKeyVault(
                    self._access.addresses(key.vault_url),
                    self._access,
                    connection_timeout=self._options.connection_timeout,
                    read_timeout=self._options.read_timeout,
                )
            return self._vaults[key.vault_url]


def _parse(name: str) -> KeyVaultKey:
    try:
        key = KeyVaultKey.parse(name)
    except InvalidValueError as exc:
        raise KeyNotFoundError(f"invalid name of a key in a key vault: {exc}", hint=exc.hint) from exc
    if key.version is not None:
        raise KeyNotFoundError(f"invalid key name {name!r}: expected the key's URL without a version")
    return key


def _parse_version(key: KeyId) -> KeyVaultKey:
    located = _parse(key.name)
    if not is_key_version(key.version):
        raise KeyNotFoundError(f"invalid version {key.version!r} of a key in a key vault")
    return KeyVaultKey(located.vault_url, located.name, key.version)


def _headers() -> dict[str, str]:
    return {"x-ms-client-request-id": str(current_correlation() or uuid.uuid4())}


def _senseless() -> KeyProviderUnavailableError:
    return KeyProviderUnavailableError("the key vault's answer is invalid")


def _table(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = document.get(name)
    if not isinstance(table, dict):
        raise _senseless()
    return table


def _version(key: KeyVaultKey, identifier: object) -> str:
    """The version in the key identifier of an answer about *key*.

    The host name may differ: a vault may use another name for itself than its caller.
    """
    try:
        answered = KeyVaultKey.parse(identifier) if isinstance(identifier, str) else None
    except InvalidValueError:
        answered = None
    if answered is None or answered.version is None or answered.name.lower() != key.name.lower():
        raise _senseless()
    if key.version not in (None, answered.version):
        raise _senseless()
    return answered.version


def _check_kind(key: KeyVaultKey, material: Mapping[str, object]) -> None:
    """Refuse a key that is no RSA key of a supported size.

    :raise KeyOperationUnsupportedError: When the key is of another type or size.
    """
    kind, modulus = material.get("kty"), material.get("n")
    bits = 8 * len(_bytes(modulus)) if modulus is not None else _KEY_BITS[0]
    if kind not in _KEY_TYPES or bits not in _KEY_BITS:
        what = f"{bits} bits" if kind in _KEY_TYPES else f"type {str(kind)[:20]!r}"
        raise KeyOperationUnsupportedError(
            f"key {key.name!r} has {what}: a customer-managed key is an RSA key of 2048, 3072 or 4096 bits"
        )


def _bytes(value: object) -> bytes:
    """Decode base64url without padding (RFC 7515 §2). The value may be a DEK, so errors do not show it."""
    if isinstance(value, str) and value.isascii():
        try:
            padded = value + "=" * (-len(value) % 4)
            return base64.b64decode(padded.encode(), altchars=b"-_", validate=True)
        except binascii.Error:
            pass
    raise _senseless()
