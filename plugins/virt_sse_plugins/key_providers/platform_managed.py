"""Platform-managed keys: KEKs stored on the host, in its keyring."""

from __future__ import annotations

from typing import Self

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from virt_sse.api import (
    ConfigError,
    Dek,
    DekContext,
    KeyDisabledError,
    KeyId,
    KeyNotFoundError,
    KeyProvider,
    KeyProviderError,
    KeyState,
    ProviderConfig,
    UnwrapError,
    WrappedDek,
)
from virt_sse_plugins.key_providers.platform_keyring_folder import KeyringFolder

ALGORITHM = "A256KW"
"""AES key wrap, RFC 3394, in the words of RFC 7518 §4.1."""


class PlatformManagedKeyProvider(KeyProvider):
    """Wraps DEKs by AES-256 key wrap under versioned KEKs in the provider's own folder. Takes no options.

    Every method but :meth:`from_config` and :meth:`key_state` raises :class:`~virt_sse.errors.KeyringError`
    when the keyring is missing, accessible to other users, damaged, or does not match its root key.
    """

    name = "platform-managed"

    def __init__(self, folder: KeyringFolder) -> None:
        self._folder = folder

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        if config.options:
            raise ConfigError(f"key provider {cls.name!r} takes no options, not {min(config.options)!r}")
        return cls(KeyringFolder(config.directory))

    def current_key(self, name: str) -> KeyId:
        return KeyId(self.name, name, self._folder.read().key(name).current)

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        return WrappedDek(aes_key_wrap(self._kek(key), context.bind(dek)), ALGORITHM, key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        if wrapped.algorithm != ALGORITHM:
            raise UnwrapError(f"a key of {self.name!r} wraps by {ALGORITHM}, not by {wrapped.algorithm!r}")
        kek = self._kek(wrapped.key)
        try:
            payload = aes_key_unwrap(kek, wrapped.ciphertext)
        except InvalidUnwrap as exc:
            raise wrapped.damaged(context) from exc
        return context.release(payload)

    def key_state(self, key: KeyId) -> KeyState:
        try:
            return self._folder.read().version(key.name, key.version).state
        except KeyNotFoundError:
            return KeyState.DELETED
        except KeyProviderError:
            return KeyState.UNREACHABLE

    def provision(self) -> bool:
        """Make root key and keyring if neither exists.

        :return: whether anything was made.
        :raise KeyringError: When only one of the two exists, or one of the two is invalid.
        """
        return self._folder.provision()

    def rotate(self, name: str) -> KeyId:
        changed = self._folder.change(lambda keyring: keyring.with_new_version(name))
        return KeyId(self.name, name, changed.key(name).current)

    def disable(self, key: KeyId) -> None:
        """Refuse any use of a version until enabled again.

        :raise KeyNotFoundError: When the version does not exist.
        """
        self._folder.change(lambda keyring: keyring.with_state(key.name, key.version, KeyState.DISABLED))

    def enable(self, key: KeyId) -> None:
        """Allow the use of a version again.

        :raise KeyNotFoundError: When the version does not exist.
        """
        self._folder.change(lambda keyring: keyring.with_state(key.name, key.version, KeyState.ENABLED))

    def close(self) -> None:
        self._folder.forget()

    def _kek(self, key: KeyId) -> bytes:
        keyring = self._folder.read()
        if keyring.version(key.name, key.version).state is KeyState.DISABLED:
            raise KeyDisabledError(f"key {key} is disabled")
        return keyring.kek(key.name, key.version)
