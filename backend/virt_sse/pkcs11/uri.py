"""PKCS#11 URIs (RFC 7512): name a token, an object inside the token, and the PKCS#11 module."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self
from urllib.parse import quote, unquote_to_bytes

from virt_sse.errors import InvalidValueError

SCHEME = "pkcs11:"

_PATH = (
    "token",
    "manufacturer",
    "serial",
    "model",
    "library-manufacturer",
    "library-version",
    "library-description",
    "slot-manufacturer",
    "slot-description",
    "slot-id",
    "object",
    "id",
    "type",
)
_QUERY = ("module-name", "module-path", "pin-source")
_MOST_SLOT = (1 << 64) - 1
"""PKCS#11 v2.40 §3.2: a ``CK_SLOT_ID`` is an unsigned long."""
_TYPES = ("cert", "data", "private", "public", "secret-key")
_PATH_SAFE = ":[]@!$'()*+,=&"
_QUERY_SAFE = ":[]@!$'()*+,=/?|"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUri:
    """A decoded URI, with the attributes of RFC 7512 (§2.3, §2.4); ``None`` for an absent attribute.

    ``pin-value`` is refused: URIs appear in configuration files, in logs and on command lines.
    """

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    library_manufacturer: str | None = None
    library_version: str | None = None
    library_description: str | None = None
    slot_manufacturer: str | None = None
    slot_description: str | None = None
    slot_id: int | None = None
    object: str | None = None
    id: bytes | None = None
    type: str | None = None
    module_name: str | None = None
    module_path: str | None = None
    pin_source: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a URI.

        :raise InvalidValueError: When *text* is not a PKCS#11 URI, has an unknown or repeated attribute, or
            holds a PIN. The message does not repeat the PIN.
        """
        if not text.startswith(SCHEME):
            raise InvalidValueError(f"a PKCS#11 URI must begin with {SCHEME!r}")
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidValueError("a PKCS#11 URI must be UTF-8") from exc
        path, _, query = text.removeprefix(SCHEME).partition("?")
        values: dict[str, str | bytes | int] = {}
        for part, separator, known in ((path, ";", _PATH), (query, "&", _QUERY)):
            for piece in part.split(separator) if part else ():
                name, equals, raw = piece.partition("=")
                if name in ("pin-value", "pin"):
                    raise InvalidValueError(
                        "a PKCS#11 URI may not hold a PIN", hint="name a file with the PIN in 'pin-source'"
                    )
                if name not in known or not equals:
                    raise InvalidValueError(f"a PKCS#11 URI has no attribute {name[:40]!r} here")
                if name.replace("-", "_") in values:
                    raise InvalidValueError(f"attribute {name!r} is repeated in the PKCS#11 URI")
                values[name.replace("-", "_")] = _decoded(name, raw)
        return cls(**values)  # type: ignore[arg-type] # _decoded returns each attribute's type

    def __str__(self) -> str:
        path = ";".join(_encoded(self, name, _PATH_SAFE) for name in _PATH if _has(self, name))
        query = "&".join(_encoded(self, name, _QUERY_SAFE) for name in _QUERY if _has(self, name))
        return f"{SCHEME}{path}" + (f"?{query}" if query else "")

    @property
    def names_a_token(self) -> bool:
        """Whether the URI has an attribute of a token or slot."""
        elsewhere = {"object", "id", "type", *(name.replace("-", "_") for name in _QUERY)}
        return any(
            getattr(self, each.name) is not None for each in fields(self) if each.name not in elsewhere
        )

    def matches(self, found: Mapping[str, str | int]) -> bool:
        """Whether the URI matches a token with the properties *found*, by attribute."""
        return all(getattr(self, name) in (None, value) for name, value in found.items())


def _has(uri: TokenUri, name: str) -> bool:
    return getattr(uri, name.replace("-", "_")) is not None


def _encoded(uri: TokenUri, name: str, safe: str) -> str:
    value = getattr(uri, name.replace("-", "_"))
    if isinstance(value, bytes):  # encode every byte, as RFC 7512 §2.3 recommends
        return f"{name}=" + "".join(f"%{byte:02X}" for byte in value)
    return f"{name}={quote(str(value), safe=safe)}"


def _decoded(name: str, raw: str) -> str | bytes | int:
    for escape in raw.split("%")[1:]:
        if len(escape) < 2 or not set(escape[:2]) <= set(string.hexdigits):
            raise InvalidValueError(f"attribute {name!r} of the PKCS#11 URI is not percent-encoded correctly")
    value = unquote_to_bytes(raw)
    if name == "id":
        return value
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidValueError(f"attribute {name!r} of the PKCS#11 URI is not UTF-8") from exc
    if name == "slot-id":
        if not (text.isascii() and text.isdigit()):
            raise InvalidValueError("attribute 'slot-id' of the PKCS#11 URI must be a decimal number")
        if len(text) > len(str(_MOST_SLOT)) or int(text) > _MOST_SLOT:
            raise InvalidValueError(f"attribute 'slot-id' of the PKCS#11 URI exceeds {_MOST_SLOT}")
        return int(text)
    if name == "type" and text not in _TYPES:
        raise InvalidValueError(f"attribute 'type' of the PKCS#11 URI must be one of {', '.join(_TYPES)}")
    return text
