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

A KEK is wrapped by RFC 3394 together with a digest of the keyring's id and its own name and version, so that
none can be moved to the place of another. The check tells another keyring's root key from a damaged KEK.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self, TypeVar

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from virt_sse.api import KeyNotFoundError, KeyringError, KeyState

FORMAT = 1
KEY_BYTES = 32
DEFAULT_KEY = "default"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class RootKey:
    """The 32 bytes that all KEKs of a keyring are wrapped under. Cannot print or pickle them."""

    material: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """A new root key from the operating system's random source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def check(self, keyring_id: str) -> str:
        """What the keyring *keyring_id* of this root key carries to recognise it by."""
        return hmac.digest(self.material, f"virt-sse keyring v1\0{keyring_id}".encode(), "sha256").hex()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a root key cannot be pickled")


@dataclass(frozen=True, slots=True)
class KekVersion:
    """One version of a key.

    :ivar created: ISO 8601, UTC.
    :ivar state: ``ENABLED`` or ``DISABLED``.
    """

    created: str
    state: KeyState
    wrapped_kek: bytes


@dataclass(frozen=True, slots=True)
class Key:
    """A key's versions by id, oldest first, and the id of the current one."""

    current: str
    versions: Mapping[str, KekVersion]


@dataclass(frozen=True, slots=True)
class Keyring:
    """A whole keyring. A value: every change makes a new one."""

    id: str
    root_key: RootKey
    keys: Mapping[str, Key]

    @classmethod
    def generate(cls) -> Self:
        """A new keyring, with a root key of its own and one version of the default key."""
        empty = cls(secrets.token_hex(16), RootKey.generate(), {})
        return empty._with_version(DEFAULT_KEY, {})

    @classmethod
    def parse(cls, document: bytes, root_key: RootKey, *, path: Path) -> Self:
        """Read a keyring.

        :param path: where *document* comes from, for messages.
        :raise KeyringError: When it is damaged, of an unknown format, or *root_key* is not its root key.
        """
        try:
            content = json.loads(document)
            format_ = _member(content, "format", int)
            if format_ != FORMAT:
                raise KeyringError(
                    f"the platform's keyring has format {format_}, this virt-sse reads {FORMAT} ({path})",
                    hint="a newer virt-sse wrote it; upgrade this one",
                )
            keyring_id = _member(content, "id", str)
            check = _member(content, "root-key-check", str)
            keys = {name: _parse_key(name, key) for name, key in _member(content, "keys", dict).items()}
        except ValueError as exc:
            raise KeyringError(
                f"the platform's keyring is damaged: {exc} ({path})", hint="restore it from a backup"
            ) from exc
        if not hmac.compare_digest(check.encode(), root_key.check(keyring_id).encode()):
            raise KeyringError(
                f"the root key is not that of the platform's keyring {keyring_id} ({path})",
                hint="restore both files from the same backup",
            )
        return cls(keyring_id, root_key, keys)

    def dump(self) -> bytes:
        """The keyring as :meth:`parse` reads it."""
        content = {
            "format": FORMAT,
            "id": self.id,
            "root-key-check": self.root_key.check(self.id),
            "keys": {
                name: {
                    "current": key.current,
                    "versions": {
                        version_id: {
                            "created": version.created,
                            "state": version.state.value,
                            "wrapped-kek": base64.b64encode(version.wrapped_kek).decode(),
                        }
                        for version_id, version in key.versions.items()
                    },
                }
                for name, key in self.keys.items()
            },
        }
        return json.dumps(content, indent=2).encode() + b"\n"

    def key(self, name: str) -> Key:
        """The key *name*.

        :raise KeyNotFoundError: When there is none.
        """
        if name not in self.keys:
            raise KeyNotFoundError(f"the platform's keyring {self.id} has no key {name!r}")
        return self.keys[name]

    def version(self, name: str, version_id: str) -> KekVersion:
        """One version of the key *name*.

        :raise KeyNotFoundError: When there is none.
        """
        versions = self.key(name).versions
        if version_id not in versions:
            raise KeyNotFoundError(
                f"the platform's keyring {self.id} has no version {version_id!r} of key {name!r}",
                hint="it may be a version of another host's keyring",
            )
        return versions[version_id]

    def kek(self, name: str, version_id: str) -> bytes:
        """The 32 bytes of a version, whatever its state.

        :raise KeyNotFoundError: When there is no such version.
        :raise KeyringError: When it is damaged.
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
        """This keyring with one more version of the key *name*, and that the current one.

        :raise KeyNotFoundError: When there is no such key.
        """
        return self._with_version(name, self.key(name).versions)

    def with_state(self, name: str, version_id: str, state: KeyState) -> Self:
        """This keyring with that version enabled or disabled.

        :raise KeyNotFoundError: When there is no such version.
        """
        version = dataclasses.replace(self.version(name, version_id), state=state)
        key = self.keys[name]
        key = dataclasses.replace(key, versions={**key.versions, version_id: version})
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


def _parse_key(name: str, content: object) -> Key:
    try:
        versions = {
            version_id: KekVersion(
                created=_member(version, "created", str),
                state=_parse_state(_member(version, "state", str)),
                wrapped_kek=base64.b64decode(_member(version, "wrapped-kek", str), validate=True),
            )
            for version_id, version in _member(content, "versions", dict).items()
        }
        current = _member(content, "current", str)
        if current not in versions:
            raise ValueError(f"its current version {current!r} is not there")
    except ValueError as exc:
        raise ValueError(f"key {name!r}: {exc}") from exc
    return Key(current, versions)


def _parse_state(text: str) -> KeyState:
    state = KeyState(text)
    if state not in (KeyState.ENABLED, KeyState.DISABLED):
        raise ValueError(f"a version cannot be {text!r} in it")
    return state


def _member(content: object, name: str, kind: type[T]) -> T:
    """Member *name* of a JSON object; ValueError when *content* is none or the member is not a *kind*."""
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"it has no {name!r}")  # noqa: TRY004 -- damaged text, not a programmer's mistake
    return value
