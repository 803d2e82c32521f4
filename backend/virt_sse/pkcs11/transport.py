"""Bringing a private key into a token without showing it to the module in clear."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from PyKCS11 import (
    CKA_CLASS,
    CKA_DECRYPT,
    CKA_ENCRYPT,
    CKA_EXTRACTABLE,
    CKA_KEY_TYPE,
    CKA_MODULUS,
    CKA_MODULUS_BITS,
    CKA_PRIVATE,
    CKA_PUBLIC_EXPONENT,
    CKA_SENSITIVE,
    CKA_TOKEN,
    CKA_UNWRAP,
    CKA_WRAP,
    CKK_AES,
    CKM_AES_KEY_WRAP_KWP,
    CKM_AES_KEY_WRAP_PAD,
    CKM_RSA_PKCS_KEY_PAIR_GEN,
    CKO_SECRET_KEY,
    Mechanism,
    PyKCS11Error,
)

from virt_sse.errors import KeyOperationUnsupportedError
from virt_sse.pkcs11 import objects
from virt_sse.pkcs11.codes import LOST
from virt_sse.pkcs11.rsa_oaep import mechanism

_TRANSPORT_BITS = 3072
"""As strong as AES-128, and the pair lives only for one transfer."""

_HASHES = (("sha256", hashes.SHA256), ("sha1", hashes.SHA1))
_PADDED_KEY_WRAPS = (CKM_AES_KEY_WRAP_KWP, CKM_AES_KEY_WRAP_PAD)
"""Two names of RFC 5649: KWP in PKCS#11 3.0, PAD before. Some tokens accept only one of them."""


def bring_in(session: Any, private: rsa.RSAPrivateKey, label: str, key_id: bytes) -> None:
    """Make *private* a key of the token, by wrapped transfer.

    The token makes a temporary RSA pair. The pair's public half wraps an AES key, and the AES key wraps the
    private key. CKM_RSA_AES_KEY_WRAP does the same in one step, but not every token supports it.

    :raise KeyOperationUnsupportedError: When the token does not support this transfer.
    :raise PyKCS11Error: When the token fails.
    """
    clear = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    transport_key = secrets.token_bytes(objects.AES_BYTES)
    wrapped = keywrap.aes_key_wrap_with_padding(transport_key, clear)
    with _transport_key_inside(session, transport_key) as unwrapping:
        _first_that_works(
            [
                lambda each=each: session.unwrapKey(
                    unwrapping, wrapped, objects.private_template(label, key_id), Mechanism(each, None)
                )
                for each in _PADDED_KEY_WRAPS
            ]
        )
    numbers = private.public_key().public_numbers()
    session.createObject(
        [
            *objects.public_template(label, key_id),
            (CKA_MODULUS, numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")),
            (CKA_PUBLIC_EXPONENT, numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")),
        ]
    )


@contextlib.contextmanager
def _transport_key_inside(session: Any, transport_key: bytes) -> Iterator[Any]:
    public, private = session.generateKeyPair(
        [
            (CKA_TOKEN, False),
            (CKA_MODULUS_BITS, _TRANSPORT_BITS),
            (CKA_PUBLIC_EXPONENT, b"\1\0\1"),
            (CKA_ENCRYPT, False),
            (CKA_WRAP, True),
        ],
        [
            (CKA_TOKEN, False),
            (CKA_PRIVATE, True),
            (CKA_SENSITIVE, True),
            (CKA_EXTRACTABLE, False),
            (CKA_DECRYPT, False),
            (CKA_UNWRAP, True),
        ],
        Mechanism(CKM_RSA_PKCS_KEY_PAIR_GEN, None),
    )
    made = [private, public]
    try:
        n, e = (
            int.from_bytes(bytes(value), "big")
            for value in session.getAttributeValue(public, (CKA_MODULUS, CKA_PUBLIC_EXPONENT))
        )
        encrypt = rsa.RSAPublicNumbers(e, n).public_key().encrypt
        template = [
            (CKA_CLASS, CKO_SECRET_KEY),
            (CKA_KEY_TYPE, CKK_AES),
            (CKA_TOKEN, False),
            (CKA_PRIVATE, True),
            (CKA_SENSITIVE, True),
            (CKA_EXTRACTABLE, False),
            (CKA_ENCRYPT, False),
            (CKA_DECRYPT, False),
            (CKA_WRAP, False),
            (CKA_UNWRAP, True),
        ]
        inside = _first_that_works(
            [
                lambda name=name, algorithm=algorithm: session.unwrapKey(
                    private,
                    encrypt(transport_key, padding.OAEP(padding.MGF1(algorithm()), algorithm(), label=None)),
                    template,
                    mechanism(name),
                )
                for name, algorithm in _HASHES
            ]
        )
        made.append(inside)
        yield inside
    finally:
        for each in made:
            with contextlib.suppress(PyKCS11Error):  # session objects end with the session at the latest
                session.destroyObject(each)


def _first_that_works(ways: list[Any]) -> Any:
    refusals = []
    for way in ways:
        try:
            return way()
        except PyKCS11Error as exc:
            if exc.value in LOST:
                raise
            refusals.append(exc)
    raise KeyOperationUnsupportedError(
        f"the token accepts no private keys by wrapped transfer: {refusals[-1]}"
    ) from refusals[-1]
