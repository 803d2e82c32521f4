"""Keys and their versions, as the vault keeps them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from virt_sse.vault.keys.material import PublicKey
from virt_sse.vault.refusals import bad_parameter

KEY_OPERATIONS = ("encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey")
"""What Azure gives an RSA key unless the caller chooses. Signing is not built in here."""

_NAME = re.compile(r"[0-9a-zA-Z-]{1,127}\Z")
_VERSION = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class Attributes:
    """What an owner sets on a version. Times are whole seconds since 1970.

    :ivar not_before: before this it does not wrap.
    :ivar expires: from this on it does not wrap.
    """

    enabled: bool = True
    not_before: int | None = None
    expires: int | None = None


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key, with what is needed to open it.

    :ivar stored: what its :class:`~virt_sse.vault.keys.material.Protection` opens it from.
    :ivar tags: the owner's own notes.
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
    """:ivar deleted: when the key was deleted.
    :ivar purge: when it will be purged.
    """

    deleted: int
    purge: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """A version that is not in use, whose material may still lie outside the database."""

    name: str
    version: str
    key_type: str


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a caller asks for when a version is made.

    :ivar operations: empty: all.
    """

    operations: tuple[str, ...] = ()
    attributes: Attributes = Attributes()
    tags: Mapping[str, str] = field(default_factory=dict)


def new_version() -> str:
    """A version that nobody can guess: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def check_name(name: str) -> str:
    """:raise Refusal: When *name* is no name for a key."""
    if not _NAME.match(name):
        raise bad_parameter("A key's name is 1 to 127 letters, digits and hyphens.")
    return name


def check_version(version: str) -> str:
    """:raise Refusal: When *version* can be none; the empty one means the newest."""
    if version and not _VERSION.match(version):
        raise bad_parameter("A key's version is 32 hexadecimal digits.")
    return version
