"""The records of keys and their versions."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from virt_sse.vault.keys.material import PublicKey
from virt_sse.vault.refusals import bad_parameter

KEY_OPERATIONS = ("encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey")
"""Azure's default operations of an RSA key. This vault does not implement signing."""

_NAME = re.compile(r"[0-9a-zA-Z-]{1,127}\Z")
_VERSION = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes of a version, set by its owner. Times are whole seconds since 1970.

    :ivar not_before: wrapping is refused before this time.
    :ivar expires: wrapping is refused from this time on.
    """

    enabled: bool = True
    not_before: int | None = None
    expires: int | None = None


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key.

    :ivar stored: sealed material or handle, for :meth:`~virt_sse.vault.keys.material.Protection.open`.
    :ivar tags: the owner's notes.
    """

    name: str
    version: str
    key_type: str
    public: PublicKey
    operations: tuple[str, ...]
    attributes: Attributes
    created: int
    updated: int
    tags: Mapping[str, str]
    stored: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Deletion:
    """The times of a key's deletion, in seconds since 1970.

    :ivar deleted: when the key was deleted.
    :ivar purge: when the key will be purged.
    """

    deleted: int
    purge: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """An unused version whose material may still exist outside the database."""

    name: str
    version: str
    key_type: str


@dataclass(frozen=True, slots=True)
class NewKey:
    """A caller's choices for a new version.

    :ivar operations: empty for all operations.
    """

    operations: tuple[str, ...] = ()
    attributes: Attributes = Attributes()
    tags: Mapping[str, str] = field(default_factory=dict)


def new_version() -> str:
    """Make a random version: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def check_name(name: str) -> str:
    """Validate a key's name, and return *name*.

    :raise Refusal: When *name* is malformed.
    """
    if not _NAME.match(name):
        raise bad_parameter("A key's name is 1 to 127 letters, digits and hyphens.")
    return name


def check_version(version: str) -> str:
    """Validate a key's version, and return *version*; an empty string means the newest version.

    :raise Refusal: When *version* is malformed.
    """
    if version and not _VERSION.match(version):
        raise bad_parameter("A key's version is 32 hexadecimal digits.")
    return version
