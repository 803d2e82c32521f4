"""Key objects in a token: lookup, attributes and the templates to make them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa
from PyKCS11 import (
    CKA_CLASS,
    CKA_DECRYPT,
    CKA_ENCRYPT,
    CKA_EXTRACTABLE,
    CKA_ID,
    CKA_KEY_TYPE,
    CKA_LABEL,
    CKA_MODULUS,
    CKA_MODULUS_BITS,
    CKA_NEVER_EXTRACTABLE,
    CKA_PRIVATE,
    CKA_PUBLIC_EXPONENT,
    CKA_SENSITIVE,
    CKA_SIGN,
    CKA_TOKEN,
    CKA_UNWRAP,
    CKA_VALUE,
    CKA_VALUE_LEN,
    CKA_VERIFY,
    CKA_WRAP,
    CKK_AES,
    CKK_GENERIC_SECRET,
    CKK_RSA,
    CKO_PRIVATE_KEY,
    CKO_PUBLIC_KEY,
    CKO_SECRET_KEY,
    PyKCS11Error,
)

from virt_sse.pkcs11.codes import STALE

Template = list[tuple[int, Any]]

RSA_BITS = (2048, 3072, 4096)
AES_BYTES = 32
EXPONENT = 65537
_MOST_RSA_BYTES = 2048
"""OpenSSL's limit for a modulus, 16384 bits."""


class KeyKind(enum.Enum):
    """Type of a key: RSA for OAEP, AES for AES key wrap."""

    RSA = "rsa"
    AES = "aes"


@dataclass(frozen=True, slots=True)
class TokenKey:
    """State of a key in a token at the time of a lookup. Contains no handle and no secret.

    :ivar id: CKA_ID.
    :ivar modulus: big-endian; RSA keys only.
    :ivar exponent: public exponent, big-endian; RSA keys only.
    :ivar is_enabled: whether the key was usable.
    :ivar is_never_extractable: whether the key has always been inside the token; ``False`` for imported keys.
    :ivar is_extractable: whether the key can leave the token, wrapped or in clear.
    """

    label: str
    id: bytes
    kind: KeyKind
    bits: int
    modulus: Annotated[bytes, msgspec.Meta(max_length=_MOST_RSA_BYTES)] | None
    exponent: Annotated[bytes, msgspec.Meta(max_length=_MOST_RSA_BYTES)] | None
    is_enabled: bool
    is_never_extractable: bool
    is_extractable: bool

    @property
    def n(self) -> int | None:
        """Modulus; RSA keys only."""
        return None if self.modulus is None else int.from_bytes(self.modulus, "big")

    @property
    def e(self) -> int | None:
        """Public exponent; RSA keys only."""
        return None if self.exponent is None else int.from_bytes(self.exponent, "big")

    @property
    def public_key(self) -> rsa.RSAPublicKey:
        """The public half.

        :raise ValueError: When the key is not an RSA key.
        """
        if self.n is None or self.e is None:
            raise ValueError("an AES key has no public half")
        return rsa.RSAPublicNumbers(self.e, self.n).public_key()


_CLASSES = {KeyKind.RSA: CKO_PRIVATE_KEY, KeyKind.AES: CKO_SECRET_KEY}
_ATTRIBUTES = (
    CKA_LABEL,
    CKA_ID,
    CKA_KEY_TYPE,
    CKA_DECRYPT,
    CKA_WRAP,
    CKA_UNWRAP,
    CKA_NEVER_EXTRACTABLE,
    CKA_SENSITIVE,
    CKA_EXTRACTABLE,
)
_RSA_ATTRIBUTES = (*_ATTRIBUTES, CKA_MODULUS, CKA_PUBLIC_EXPONENT)
_AES_ATTRIBUTES = (*_ATTRIBUTES, CKA_VALUE_LEN)


def locate(
    session: Any, kind: KeyKind, label: str | None = None, key_id: bytes | None = None
) -> list[tuple[Any, TokenKey]]:
    """Find keys by kind, label and id; ``None`` matches any value. Returns handles and keys."""
    template: Template = [(CKA_CLASS, _CLASSES[kind]), (CKA_TOKEN, True)]
    found = []
    for handle in session.findObjects(template + _names(label, key_id)):
        try:
            key = read(session, handle, kind)
        except PyKCS11Error as exc:
            if exc.value not in STALE:  # otherwise destroyed during the search
                raise
            continue
        # Compared here, too: the module sees a label with a NUL only up to the NUL.
        if key is not None and label in (None, key.label) and key_id in (None, key.id):
            found.append((handle, key))
    return found


def read(session: Any, handle: Any, kind: KeyKind) -> TokenKey | None:
    """Read a key's attributes; ``None`` when the object is neither an RSA nor an AES key.

    :raise PyKCS11Error: With a value in :data:`STALE` when the handle is stale, or with another value.
    """
    names = _RSA_ATTRIBUTES if kind is KeyKind.RSA else _AES_ATTRIBUTES
    values = dict(zip(names, session.getAttributeValue(handle, names), strict=True))
    if values[CKA_KEY_TYPE] != (CKK_RSA if kind is KeyKind.RSA else CKK_AES):
        return None
    is_inside = values[CKA_SENSITIVE] is True and values[CKA_EXTRACTABLE] is False
    label, key_id = values[CKA_LABEL] or "", bytes(values[CKA_ID] or ())
    never = is_inside and values[CKA_NEVER_EXTRACTABLE] is True
    if kind is KeyKind.AES:
        enabled = values[CKA_WRAP] is True and values[CKA_UNWRAP] is True
        bits = 8 * (values[CKA_VALUE_LEN] or AES_BYTES)
        return TokenKey(label, key_id, kind, bits, None, None, enabled, never, not is_inside)
    n, e = _number(values[CKA_MODULUS]), _number(values[CKA_PUBLIC_EXPONENT])
    if not e:
        n, e = _public_numbers(session, label, key_id, n)
    enabled = values[CKA_DECRYPT] is True
    return TokenKey(label, key_id, kind, n.bit_length(), _bytes(n), _bytes(e), enabled, never, not is_inside)


def public_handles(session: Any, label: str, key_id: bytes) -> list[Any]:
    """Handles of the public halves stored in the token."""
    template: Template = [(CKA_CLASS, CKO_PUBLIC_KEY), (CKA_TOKEN, True)]
    return list(session.findObjects(template + _names(label, key_id)))


def _public_numbers(session: Any, label: str, key_id: bytes, n: int) -> tuple[int, int]:
    """Modulus and exponent, from the public half: not every token shows the exponent of a private key."""
    for handle in public_handles(session, label, key_id):
        numbers = [
            _number(each) for each in session.getAttributeValue(handle, (CKA_MODULUS, CKA_PUBLIC_EXPONENT))
        ]
        if n in (0, numbers[0]):
            return numbers[0], numbers[1]
    return n, EXPONENT


def _names(label: str | None, key_id: bytes | None) -> Template:
    names: Template = []
    if label is not None:
        names.append((CKA_LABEL, label))
    if key_id is not None:
        names.append((CKA_ID, key_id))
    return names


def _bytes(number: int) -> bytes:
    """Without leading zeros: the same number has the same bytes."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _number(value: tuple[int, ...] | None) -> int:
    return int.from_bytes(bytes(value or ()), "big")


def private_template(label: str, key_id: bytes) -> Template:
    """Template of a private RSA key: decrypts only, never extractable."""
    return [
        *_kept(CKO_PRIVATE_KEY, CKK_RSA, label, key_id),
        (CKA_DECRYPT, True),
        (CKA_SIGN, False),
        (CKA_UNWRAP, False),
    ]


def public_template(label: str, key_id: bytes) -> Template:
    """Template of the public half of an RSA key."""
    return [
        (CKA_CLASS, CKO_PUBLIC_KEY),
        (CKA_KEY_TYPE, CKK_RSA),
        (CKA_TOKEN, True),
        (CKA_PRIVATE, False),
        (CKA_LABEL, label),
        (CKA_ID, key_id),
        (CKA_ENCRYPT, True),
        (CKA_VERIFY, False),
        (CKA_WRAP, False),
    ]


def new_public_template(label: str, key_id: bytes, bits: int) -> Template:
    """Template of the public half for generating a pair."""
    return [*public_template(label, key_id), (CKA_MODULUS_BITS, bits), (CKA_PUBLIC_EXPONENT, b"\1\0\1")]


def secret_template(label: str, key_id: bytes) -> Template:
    """Template of an AES key: wraps and unwraps only, never extractable."""
    return [
        *_kept(CKO_SECRET_KEY, CKK_AES, label, key_id),
        (CKA_VALUE_LEN, AES_BYTES),
        (CKA_WRAP, True),
        (CKA_UNWRAP, True),
        (CKA_ENCRYPT, False),
        (CKA_DECRYPT, False),
        (CKA_SIGN, False),
        (CKA_VERIFY, False),
    ]


def payload_template(payload: bytes | None = None) -> Template:
    """Template of a payload for AES key wrap: a session object, readable by this process."""
    template: Template = [
        (CKA_CLASS, CKO_SECRET_KEY),
        (CKA_KEY_TYPE, CKK_GENERIC_SECRET),
        (CKA_TOKEN, False),
        (CKA_PRIVATE, True),
        (CKA_SENSITIVE, False),
        (CKA_EXTRACTABLE, True),
    ]
    return template if payload is None else [*template, (CKA_VALUE, payload)]


def enabling_template(kind: KeyKind, *, enabled: bool) -> Template:
    """Template to enable or disable a key."""
    if kind is KeyKind.RSA:
        return [(CKA_DECRYPT, enabled)]
    return [(CKA_WRAP, enabled), (CKA_UNWRAP, enabled)]


def _kept(object_class: int, key_type: int, label: str, key_id: bytes) -> Template:
    return [
        (CKA_CLASS, object_class),
        (CKA_KEY_TYPE, key_type),
        (CKA_TOKEN, True),
        (CKA_PRIVATE, True),
        (CKA_SENSITIVE, True),
        (CKA_EXTRACTABLE, False),
        (CKA_LABEL, label),
        (CKA_ID, key_id),
    ]
