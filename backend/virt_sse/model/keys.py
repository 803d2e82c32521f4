"""Keys: DEKs and the contract of those who wrap them.

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

from virt_sse.errors import KeyOperationUnsupportedError, UnwrapError

DEK_BYTES = 32


@dataclass(frozen=True, slots=True, eq=False)
class Dek:
    """A data encryption key: 32 random bytes whose base64 is the passphrase of a LUKS keyslot.

    Cannot print or pickle its material, and compares in constant time.
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
        """What LUKS takes: 44 ASCII bytes, printable because libvirt and QEMU pass passphrases as text."""
        return base64.b64encode(self.material)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dek) and hmac.compare_digest(self.material, other.material)

    __hash__ = None  # type: ignore[assignment] # a secret is no dictionary key

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DEK cannot be pickled")


@dataclass(frozen=True, slots=True)
class KeyRef:
    """A key whose version is not chosen yet: the provider's current one will be."""

    provider: str
    name: str

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}"


@dataclass(frozen=True, slots=True)
class KeyId:
    """A KEK, by the name of its provider, its own name there, and its version.

    The text form is ``provider:name:version``. Names may hold ``/`` and ``:`` (a key vault's URL does);
    provider names and versions may not hold ``:``.
    """

    provider: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.provider}:{self.name}:{self.version}"


class KeyState(enum.Enum):
    """What a provider says of a key's version. ``UNREACHABLE`` is no verdict: it is never a revocation."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    DELETED = "deleted"
    DENIED = "denied"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class DekContext:
    """What a wrapped DEK is bound to: it opens for this disk and this slot (layer) only."""

    disk_id: UUID
    slot: str

    def digest(self) -> bytes:
        """SHA-256 of the context's unambiguous text; 32 bytes."""
        return hashlib.sha256(f"virt-sse dek v1\0{self.disk_id}\0{self.slot}".encode()).digest()

    def bind(self, dek: Dek) -> bytes:
        """The payload that a provider wraps: DEK, then the context's digest; 64 bytes.

        In the payload because RSA-OAEP and AES key wrap have no associated data.
        """
        return dek.material + self.digest()

    def release(self, payload: bytes) -> Dek:
        """The DEK of an unwrapped payload.

        :raise UnwrapError: When the payload was bound to another context, or is none.
        """
        digest = self.digest()
        if len(payload) != DEK_BYTES + len(digest) or not hmac.compare_digest(payload[DEK_BYTES:], digest):
            raise UnwrapError(f"the wrapped DEK does not belong to slot {self.slot!r} of disk {self.disk_id}")
        return Dek(payload[:DEK_BYTES])


@dataclass(frozen=True, slots=True)
class WrappedDek:
    """A DEK under a KEK, with that KEK's version pinned at wrap time.

    :ivar algorithm: the JOSE name (RFC 7518 §4.1), e.g. ``A256KW`` or ``RSA-OAEP-256``.
    """

    ciphertext: bytes
    algorithm: str
    key: KeyId


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """What a key provider is made from.

    :ivar directory: the provider's own folder, 0700; it need not exist yet.
    :ivar options: its table ``[key-providers.NAME]`` of the configuration file.
    :ivar identity: the credential file of the identity that the provider acts as; ``None`` for none.
    """

    directory: Path
    options: Mapping[str, object] = field(default_factory=dict)
    identity: Path | None = None


class KeyProvider(ABC):
    """Holds KEKs and wraps DEKs with them. Synchronous, and safe to call from several threads at once.

    Implementations raise :class:`~virt_sse.errors.KeyProviderError` and its kinds, by meaning, and put no
    key material into any message.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        """Make the provider. Does not create keys and need not reach the place where they live.

        :raise ConfigError: When its options make no sense.
        """

    @classmethod
    def parse_key(cls, text: str) -> tuple[str, str | None]:
        """Name and, where *text* has one, version of the key that an administrator means by *text*.

        :raise InvalidValueError: When it can be no key of this provider.
        """
        return text, None

    @classmethod
    def needs_identity(cls, config: ProviderConfig) -> bool:
        """Whether it acts with the identity of a disk encryption set, :attr:`ProviderConfig.identity`."""
        return False

    @abstractmethod
    def current_key(self, name: str) -> KeyId:
        """The version of the key *name* that new DEKs are wrapped with.

        :raise KeyNotFoundError: When there is no such key.
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

        :raise UnwrapError: When *wrapped* was altered, or bound to another context.
        :raise KeyNotFoundError: When the provider has no such version.
        :raise KeyDisabledError: When the version is disabled.
        """

    @abstractmethod
    def key_state(self, key: KeyId) -> KeyState:
        """The state of that version. Raises nothing: a dead provider is ``UNREACHABLE``."""

    def provision(self) -> bool:
        """Make what the provider needs before its first use, unless it is there; whether anything was made.

        Run by ``virt-sse host init`` alone, so that a lost keyring is never silently replaced by a new one.
        """
        return False

    def rotate(self, name: str) -> KeyId:
        """Make a new version of the key *name* and make it current. Older versions still unwrap.

        :raise KeyOperationUnsupportedError: When the keys of this provider are rotated elsewhere.
        """
        raise KeyOperationUnsupportedError(
            f"the keys of key provider {self.name!r} are not rotated from here"
        )

    def close(self) -> None:
        """Let go of connections and secrets. The provider is not used afterwards."""
        return
