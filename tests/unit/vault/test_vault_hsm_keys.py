"""Public keys as a token states them to a vault."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from virt_sse.pkcs11.objects import KeyKind, TokenKey
from virt_sse.vault.home.sealing import Sealer
from virt_sse.vault.hsm.protection import HsmProtection, HsmRefusal

MODULUS = b"\xc5" + bytes(254) + b"\x01"


def stated(modulus: bytes | None, exponent: bytes | None) -> TokenKey:
    return TokenKey("key", b"1", KeyKind.RSA, 2048, modulus, exponent, True, True, False)


@pytest.mark.parametrize(
    ("modulus", "exponent"),
    [
        (None, None),
        (b"", b""),
        (MODULUS, b"\x00"),
        (MODULUS, b"\x01"),
        (MODULUS, b"\x01\x00\x00"),
        (MODULUS, b"\x01" + bytes(8) + b"\x01"),
        (b"\x03", b"\x01\x00\x01"),
    ],
)
def test_an_impossible_public_key_is_refused_when_made(modulus: bytes | None, exponent: bytes | None) -> None:
    token = Mock(generate_rsa=Mock(return_value=stated(modulus, exponent)))
    protection = HsmProtection(lambda: token, "tag", Sealer(AESGCM(bytes(32))))
    with pytest.raises(HsmRefusal) as refused:
        protection.generate(2048, "name", "00" * 16)
    assert "the token states an" in refused.value.detail


def test_a_possible_one_is_taken() -> None:
    token = Mock(generate_rsa=Mock(return_value=stated(MODULUS, b"\x01\x00\x01")))
    public, _ = HsmProtection(lambda: token, "tag", Sealer(AESGCM(bytes(32)))).generate(
        2048, "name", "00" * 16
    )
    assert (public.n, public.e) == (int.from_bytes(MODULUS, "big"), 65537)
