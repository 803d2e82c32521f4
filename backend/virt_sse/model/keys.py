"""Keys: DEKs, and the contract of the key providers that wrap them.

A key provider holds KEKs and wraps DEKs with them. A DEK leaves this process only as a :class:`WrappedDek`,
or on a pipe to QEMU, cryptsetup or libvirt.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NoReturn, Self
from uuid import UUID

from virt_sse.errors import (
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    UnwrapError,
    VirtSseError,
)

DEK_BYTES = 32


@dataclass(frozen=True, slots=True, eq=False)
class Dek:
    """A data encryption key: 32 random bytes whose base64 is the passphrase of a LUKS keyslot.

    Its material is never printed or pickled, and is compared in constant time.
    """

    material: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.material) != DEK_BYTES:
            raise ValueError(f"a DEK has {DEK_BYTES} bytes, not {len(self.material)}")

    @classmethod
    def generate(cls) -> Self:
        """A new DEK from the operating system's random source."""
        return cls(secrets.token_bytes(DEK_BYTES))

    @property
    def passphrase(self) -> bytes:
        """The LUKS passphrase: 44 printable ASCII bytes, as libvirt and QEMU pass passphrases as text."""
        return base64.b64encode(self.material)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dek) and hmac.compare_digest(self.material, other.material)

    __hash__ = None  # type: ignore[assignment] # a secret must not become a dictionary key

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DEK cannot be pickled")


@dataclass(frozen=True, slots=True)
class KeyRef:
    """A key without a version: stands for the provider's current version of the key."""

    provider: str
    name: str

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}"


@dataclass(frozen=True, slots=True)
class KeyId:
    """A version of a KEK, by the name of its provider, its own name there, and its version.

    The text form is ``provider:name:version``. Names may hold ``/`` and ``:`` (a key vault's URL does);
    provider names and versions may not hold ``:``.
    """

    provider: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}:{self.version}"


class KeyState(enum.Enum):
    """State of a key version, according to its provider. ``UNREACHABLE`` is unknown, never a revocation."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    DELETED = "deleted"
    DENIED = "denied"
    UNREACHABLE = "unreachable"

    @classmethod
    def of_error(cls, error: VirtSseError) -> KeyState:
        """The state that a provider's error tells; ``UNREACHABLE`` if it tells nothing about the key."""
        for kind, state in _STATES_OF_ERRORS:
            if isinstance(error, kind):
                return state
        return cls.UNREACHABLE


_STATES_OF_ERRORS: tuple[tuple[type[VirtSseError], KeyState], ...] = (
    (KeyDisabledError, KeyState.DISABLED),
    (KeyNotFoundError, KeyState.DELETED),
    (KeyDeniedError, KeyState.DENIED),
)


@dataclass(frozen=True, slots=True)
class DekContext:
    """The disk and slot (layer) to which a wrapped DEK is bound: it unwraps for no other context."""

    disk_id: UUID
    slot: str

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) over an unambiguous text form of the context."""
        return hashlib.sha256(f"virt-sse dek v1\0{self.disk_id}\0{self.slot}".encode()).digest()

    def bind(self, dek: Dek) -> bytes:
        """The payload for a provider to wrap: the DEK, then the context's digest; 64 bytes.

        RSA-OAEP and AES key wrap have no associated data, therefore the digest is part of the payload.
        """
        return dek.material + self.digest()

    def release(self, payload: bytes) -> Dek:
        """The DEK of an unwrapped payload.

        :raise UnwrapError: When the payload is malformed or bound to a different context.
        """
        digest = self.digest()
        if len(payload) != DEK_BYTES + len(digest) or not hmac.compare_digest(payload[DEK_BYTES:], digest):
            raise UnwrapError(f"the wrapped DEK does not belong to slot {self.slot!r} of disk {self.disk_id}")
        return Dek(payload[:DEK_BYTES])


@dataclass(frozen=True, slots=True)
class WrappedDek:
    """A DEK under a KEK, with the version of the KEK pinned at wrap time.

    :ivar algorithm: JOSE name (RFC 7518 §4.1), e.g. ``A256KW`` or ``RSA-OAEP-256``.
    """

    ciphertext: bytes
    algorithm: str
    key: KeyId

    def damaged(self, context: DekContext, reason: object = None) -> UnwrapError:
        """The error of a provider that cannot unwrap for *context*, with the provider's *reason*, if any."""
        return UnwrapError(
            f"{reason}: "
            * (reason is not None)
            + f"the wrapped DEK of slot {context.slot!r} of disk {context.disk_id} is damaged, "
            f"or was not wrapped with {self.key}"
        )


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """Configuration of a key provider.

    :ivar directory: the provider's own folder, mode 0700; may not exist yet.
    :ivar options: the provider's table ``[key-providers.NAME]`` of the configuration file, unchecked.
    :ivar identity: credential file of the managed identity for the provider to use, if any.
    """

    directory: Path
    options: Mapping[str, object] = field(default_factory=dict)
    identity: Path | None = None


class KeyProvider(ABC):
    """Holds KEKs and wraps DEKs with them. Synchronous and thread-safe.

    Implementations raise the subclass of :class:`~virt_sse.errors.KeyProviderError` that fits the failure,
    and put no key material into messages.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        """Make the provider. Creates no keys, and works while the provider's server is unreachable.

        :raise ConfigError: When an option is invalid.
        """

    @classmethod
    def parse_key(cls, text: str) -> tuple[str, str | None]:
        """Split an administrator's text for a key into name and version (``None`` if not given).

        :raise InvalidValueError: When *text* cannot be a key of this provider.
        """
        return text, None

    @classmethod
    def needs_identity(cls, config: ProviderConfig) -> bool:
        """Whether the provider authenticates with a disk encryption set's :attr:`ProviderConfig.identity`."""
        return False

    @abstractmethod
    def current_key(self, name: str) -> KeyId:
        """The current version of the key *name*, for wrapping new DEKs.

        :raise KeyNotFoundError: When the provider has no key *name*.
        """

    @abstractmethod
    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        """Wrap *dek* with exactly the version in *key*, bound to *context*.

        :raise KeyNotFoundError: When the provider has no such version.
        :raise KeyDisabledError: When the version is disabled.
        """

    @abstractmethod
    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        """The DEK in *wrapped*.

        :raise UnwrapError: When *wrapped* was altered, or is bound to a different context.
        :raise KeyNotFoundError: When the provider has no such version.
        :raise KeyDisabledError: When the version is disabled.
        """

    @abstractmethod
    def key_state(self, key: KeyId) -> KeyState:
        """The state of the version in *key*. Never raises: a failing provider is ``UNREACHABLE``."""

    def provision(self) -> bool:
        """Create whatever the provider needs before its first use; return whether anything was created.

        Called by ``virt-sse host init`` only, so that a new keyring never silently replaces a lost keyring.
        """
        return False

    def rotate(self, name: str) -> KeyId:
        """Create a new, current version of the key *name*. Older versions still unwrap.

        :raise KeyOperationUnsupportedError: When the provider's keys are rotated elsewhere.
        """
        raise KeyOperationUnsupportedError(f"virt-sse cannot rotate keys of key provider {self.name!r}")

    def close(self) -> None:
        """Release connections and secrets. The provider is not used afterwards."""
        return
