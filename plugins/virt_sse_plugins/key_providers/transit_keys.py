"""Keys of a transit secrets engine: their paths, their types, and the limits set by their administrator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import msgspec

from virt_sse.api import (
    InvalidValueError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderUnavailableError,
)

_HINT = "a transit key is MOUNT/keys/NAME, e.g. transit/keys/web, followed by /VERSION to name a version"
_SEGMENT = r"(?!keys/)[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?"
_PATH = re.compile(
    rf"(?P<mount>{_SEGMENT}(?:/{_SEGMENT}){{0,7}})/keys/"
    r"(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?)(?:/(?P<version>[1-9][0-9]{0,8}))?",
    re.ASCII,
)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_LONGEST_PATH = 256


@dataclass(frozen=True, slots=True)
class TransitPath:
    """The path of a transit key below the server's ``/v1/``.

    :ivar mount: path of the secrets engine, e.g. ``transit``; may begin with namespaces.
    """

    mount: str
    name: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.mount}/keys/{self.name}"

    def operation(self, verb: str) -> str:
        """The path of ``encrypt``, ``decrypt`` and so on with this key."""
        return f"{self.mount}/{verb}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the path of a key.

        :raise InvalidValueError: When *text* is not the path of a key.
        """
        match = _PATH.fullmatch(text) if len(text) <= _LONGEST_PATH else None
        if match is None:
            hint = _HINT
            if text.startswith(("http:", "https:")):
                hint += "; the server is named by 'urls' in the provider's configuration"
            raise InvalidValueError(f"{text[:200]!r} is not the path of a transit key", hint=hint)
        return cls(match["mount"], match["name"], match["version"])


def is_transit_version(version: str) -> bool:
    """Whether *version* has the form of a version of a transit key: a decimal number from 1."""
    return _VERSION.fullmatch(version) is not None


@dataclass(frozen=True, slots=True)
class TransitAlgorithm:
    """Wrapping with one type of transit keys.

    :ivar name: as in :class:`~virt_sse.api.WrappedDek`: RFC 7518 §4.7, or draft-amringer-jose-chacha.
    :ivar ciphertext_length: nonce, payload of 64 bytes and tag, in bytes.
    """

    name: str
    ciphertext_length: int


ALGORITHMS: Mapping[str, TransitAlgorithm] = {
    "aes256-gcm96": TransitAlgorithm("A256GCMKW", 12 + 64 + 16),
    "chacha20-poly1305": TransitAlgorithm("C20PKW", 12 + 64 + 16),
    "xchacha20-poly1305": TransitAlgorithm("XC20PKW", 24 + 64 + 16),
}
"""By key type. RSA keys lack associated data, and ``aes128-gcm96`` is weaker than a disk's cipher."""


class TransitKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key, as described by ``GET MOUNT/keys/NAME``; members unknown here are ignored.

    :ivar min_available_version: older versions were trimmed: destroyed. 0 for none.
    :ivar min_decryption_version: older versions do not decrypt until this limit is lowered.
    :ivar min_encryption_version: older versions do not encrypt; 0 for no limit.
    :ivar soft_deleted: deleted, and can be restored (OpenBao).
    """

    type: str
    latest_version: int
    min_available_version: int = 0
    min_decryption_version: int = 0
    min_encryption_version: int = 0
    soft_deleted: bool = False

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Self:
        """The key in an answer's data.

        :raise KeyProviderUnavailableError: When *document* does not describe a key.
        """
        try:
            return msgspec.convert(document, cls)
        except (msgspec.ValidationError, UnicodeError):
            raise KeyProviderUnavailableError("the key vault's answer is invalid") from None

    def algorithm(self, path: TransitPath) -> TransitAlgorithm:
        """How the key wraps.

        :raise KeyOperationUnsupportedError: When the key's type is unsupported.
        """
        if self.type not in ALGORITHMS:
            raise KeyOperationUnsupportedError(
                f"transit key {path} cannot wrap DEKs: its type is {self.type[:40]!r}",
                hint=f"supported: {', '.join(ALGORITHMS)}",
            )
        return ALGORITHMS[self.type]

    def check(self, path: TransitPath, version: int) -> None:
        """Check that a version decrypts.

        :raise KeyNotFoundError: When the version never existed, or is destroyed, or the key is deleted.
        :raise KeyDisabledError: When the version is older than the key's ``min_decryption_version``.
        """
        if self.soft_deleted:
            raise KeyNotFoundError(
                f"transit key {path} is deleted", hint=f"restore it with {path}/soft-delete-restore"
            )
        if not max(1, self.min_available_version) <= version <= self.latest_version:
            raise KeyNotFoundError(f"transit key {path} has no version {version}")
        if version < self.min_decryption_version:
            raise KeyDisabledError(
                f"version {version} of transit key {path} is disabled: min_decryption_version is "
                f"{self.min_decryption_version}",
                hint=f"the key's administrator can lower it with {path}/config",
            )

    def check_encryption(self, path: TransitPath, version: int) -> None:
        """Check that a version encrypts and decrypts.

        :raise KeyNotFoundError: As :meth:`check`.
        :raise KeyDisabledError: As :meth:`check`; also when the version is older than
            ``min_encryption_version``.
        """
        self.check(path, version)
        if version < self.min_encryption_version:
            raise KeyDisabledError(
                f"version {version} of transit key {path} does not encrypt: min_encryption_version is "
                f"{self.min_encryption_version}"
            )
