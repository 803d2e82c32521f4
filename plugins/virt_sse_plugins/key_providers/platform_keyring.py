"""The platform's keyring: versioned AES-256 KEKs, each wrapped under one root key.

The keyring is JSON, format 1::

    {
      "format": 1,
      "id": "32 hex characters",
      "root-key-check": "64 hex characters",
      "keys": {
        "default": {
          "current": "VERSION",
          "versions": {
            "VERSION": {"created": "2025-01-31T12:00:00+00:00", "state": "enabled", "wrapped-kek": "base64"}
          }
        }
      }
    }

A KEK is wrapped (RFC 3394) together with a digest of the keyring's id, the key's name and the version: a
wrapped KEK moved to a different place fails to unwrap. ``root-key-check`` distinguishes a wrong root key from
a damaged KEK.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

import msgspec
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from virt_sse.api import DocumentError, KeyNotFoundError, KeyringError, KeyState, from_json

FORMAT = 1
KEY_BYTES = 32
DEFAULT_KEY = "default"


@dataclass(frozen=True, slots=True, eq=False)
class KeyringRootKey:
    """The 32 bytes wrapping all KEKs of a keyring. Cannot be printed or pickled."""

    material: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """A new root key from the operating system's random source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def check(self, keyring_id: str) -> str:
        """Check value stored in the keyring *keyring_id* to recognise its root key."""
        return hmac.digest(self.material, f"virt-sse keyring v1\0{keyring_id}".encode(), "sha256").hex()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a root key cannot be pickled")


class KekVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """One version of a key.

    :ivar created: ISO 8601, UTC.
    :ivar state: ``ENABLED`` or ``DISABLED``.
    """

    created: str
    state: KeyState
    wrapped_kek: bytes

    def __post_init__(self) -> None:
        if self.state not in (KeyState.ENABLED, KeyState.DISABLED):
            raise ValueError(f"a version's state cannot be {self.state.value!r}")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key's versions by id, oldest first, and the id of the current version."""

    current: str
    versions: Mapping[str, KekVersion]

    def __post_init__(self) -> None:
        if self.current not in self.versions:
            raise ValueError(f"the current version {self.current!r} is missing")


class _Format(msgspec.Struct, frozen=True):
    format: int


class _Document(_Format, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    id: str
    root_key_check: str
    keys: Mapping[str, Key]


@dataclass(frozen=True, slots=True)
class Keyring:
    """A keyring. Immutable: every change makes a new keyring."""

    id: str
    root_key: KeyringRootKey
    keys: Mapping[str, Key]

    @classmethod
    def generate(cls) -> Self:
        """A new keyring with a new root key and one version of the default key."""
        empty = cls(secrets.token_hex(16), KeyringRootKey.generate(), {})
        return empty._with_version(DEFAULT_KEY, {})

    @classmethod
    def parse(cls, document: bytes, root_key: KeyringRootKey, *, path: Path) -> Self:
        """Read a keyring.

        :param path: origin of *document*, for messages.
        :raise KeyringError: When *document* is damaged or of an unknown format, or *root_key* does not match.
        """
        try:
            format_ = from_json(document, _Format).format
            if format_ != FORMAT:
                raise KeyringError(
                    f"the platform's keyring has format {format_}, this virt-sse reads {FORMAT} ({path})",
                    hint="the keyring was written by a newer virt-sse; upgrade this one",
                )
            content = from_json(document, _Document)
        except DocumentError as exc:
            raise KeyringError(
                f"the platform's keyring is damaged: {exc} ({path})", hint="restore it from a backup"
            ) from exc
        if not hmac.compare_digest(content.root_key_check.encode(), root_key.check(content.id).encode()):
            raise KeyringError(
                f"the root key does not match the platform's keyring {content.id[:80]!r} ({path})",
                hint="restore both files from the same backup",
            )
        return cls(content.id, root_key, content.keys)

    def dump(self) -> bytes:
        """The keyring in the format of :meth:`parse`."""
        content = _Document(FORMAT, self.id, self.root_key.check(self.id), self.keys)
        return json.dumps(msgspec.to_builtins(content), indent=2).encode() + b"\n"

    def key(self, name: str) -> Key:
        """The key *name*.

        :raise KeyNotFoundError: When the key does not exist.
        """
        if name not in self.keys:
            raise KeyNotFoundError(f"the platform's keyring {self.id} has no key {name!r}")
        return self.keys[name]

    def version(self, name: str, version_id: str) -> KekVersion:
        """One version of the key *name*.

        :raise KeyNotFoundError: When the version does not exist.
        """
        versions = self.key(name).versions
        if version_id not in versions:
            raise KeyNotFoundError(
                f"the platform's keyring {self.id} has no version {version_id!r} of key {name!r}",
                hint="it may be a version of another host's keyring",
            )
        return versions[version_id]

    def kek(self, name: str, version_id: str) -> bytes:
        """The 32 bytes of a version, regardless of its state.

        :raise KeyNotFoundError: When the version does not exist.
        :raise KeyringError: When the wrapped KEK is damaged.
        """
        damaged = KeyringError(
            f"version {version_id!r} of key {name!r} in the platform's keyring {self.id} is damaged",
            hint="restore the keyring from a backup",
        )
        try:
            payload = aes_key_unwrap(self.root_key.material, self.version(name, version_id).wrapped_kek)
        except InvalidUnwrap as exc:
            raise damaged from exc
        if not hmac.compare_digest(payload[KEY_BYTES:], self._binding(name, version_id)):
            raise damaged
        return payload[:KEY_BYTES]

    def with_new_version(self, name: str) -> Self:
        """This keyring with a new current version of the key *name*.

        :raise KeyNotFoundError: When the key does not exist.
        """
        return self._with_version(name, self.key(name).versions)

    def with_state(self, name: str, version_id: str, state: KeyState) -> Self:
        """This keyring with the version enabled or disabled.

        :raise KeyNotFoundError: When the version does not exist.
        """
        version = msgspec.structs.replace(self.version(name, version_id), state=state)
        key = self.keys[name]
        key = msgspec.structs.replace(key, versions={**key.versions, version_id: version})
        return dataclasses.replace(self, keys={**self.keys, name: key})

    def _with_version(self, name: str, older: Mapping[str, KekVersion]) -> Self:
        version_id = secrets.token_hex(16)
        payload = secrets.token_bytes(KEY_BYTES) + self._binding(name, version_id)
        version = KekVersion(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            state=KeyState.ENABLED,
            wrapped_kek=aes_key_wrap(self.root_key.material, payload),
        )
        key = Key(version_id, {**older, version_id: version})
        return dataclasses.replace(self, keys={**self.keys, name: key})

    def _binding(self, name: str, version_id: str) -> bytes:
        return hashlib.sha256("\0".join(("virt-sse kek v1", self.id, name, version_id)).encode()).digest()
