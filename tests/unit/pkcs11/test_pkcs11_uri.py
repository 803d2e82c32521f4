# ruff: noqa: S106 -- this kind of token is no secret
from __future__ import annotations

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.pkcs11.uri import TokenUri


def test_the_examples_of_rfc_7512_are_read() -> None:
    """RFC 7512 §3, but for those that hold a PIN."""
    assert TokenUri.parse("pkcs11:") == TokenUri()
    uri = TokenUri.parse(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
        "model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial="
        "?pin-source=file:/etc/token_pin"
    )
    assert uri == TokenUri(
        token="The Software PKCS#11 Softtoken",
        manufacturer="Snake Oil, Inc.",
        model="1.0",
        object="my-certificate",
        type="cert",
        id=bytes.fromhex("69953e5cf4bdec91"),
        serial="",
        pin_source="file:/etc/token_pin",
    )
    assert TokenUri.parse("pkcs11:slot-description=Sun%20Metaslot").slot_description == "Sun Metaslot"
    assert TokenUri.parse("pkcs11:library-version=3;slot-id=42").slot_id == 42
    query = TokenUri.parse("pkcs11:?module-path=/mnt/libmypkcs11.so.1&module-name=mypkcs11")
    assert (query.module_path, query.module_name) == ("/mnt/libmypkcs11.so.1", "mypkcs11")


@pytest.mark.parametrize(
    "uri",
    [
        TokenUri(),
        TokenUri(token="a;b=c?d&e%2F é", object="x/y:z", id=b"\0\xff", slot_id=0),
        TokenUri(serial="1", module_path="/a b/c&d.so", pin_source="|x"),
    ],
)
def test_a_written_uri_is_read_back(uri: TokenUri) -> None:
    assert TokenUri.parse(str(uri)) == uri
    assert str(uri).isascii()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token=a", "must begin with"),
        ("pkcs12:token=a", "must begin with"),
        ("pkcs11:token=a;token=b", "is repeated"),
        ("pkcs11:colour=red", "no attribute 'colour'"),
        ("pkcs11:token", "no attribute 'token'"),
        ("pkcs11:pin-source=/x", "no attribute 'pin-source' here"),
        ("pkcs11:?token=a", "no attribute 'token' here"),
        ("pkcs11:token=%zz", "percent-encoded"),
        ("pkcs11:token=%4", "percent-encoded"),
        ("pkcs11:token=%ff", "not UTF-8"),
        ("pkcs11:slot-id=-1", "decimal"),
        ("pkcs11:slot-id=18446744073709551616", "exceeds"),
        ("pkcs11:slot-id=" + "9" * 5000, "exceeds"),
        ("pkcs11:slot-id=\u0661", "decimal"),
        ("pkcs11:token=\ud800", "must be UTF-8"),
        ("pkcs11:type=key", "must be one of"),
        ("pkcs11:token=a;;serial=1", "no attribute ''"),
    ],
)
def test_an_unsuitable_uri_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        TokenUri.parse(text)


@pytest.mark.parametrize(
    "text", ["pkcs11:?pin-value=4711", "pkcs11:token=a;pin-value=4711", "pkcs11:?pin=4711"]
)
def test_a_pin_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidValueError, match="may not hold a PIN") as caught:
        TokenUri.parse(text)
    assert "4711" not in repr(caught.value) + str(caught.value.hint)


def test_a_token_must_match_every_attribute() -> None:
    found: dict[str, str | int] = {"token": "a", "serial": "1", "slot_id": 2}
    assert TokenUri().matches(found)
    assert TokenUri(token="a", slot_id=2, object="key").matches(found)
    assert not TokenUri(token="a", serial="2").matches(found)
    assert not TokenUri(token="A").matches(found)
    assert not TokenUri(slot_id=0).matches(found)


def test_a_uri_knows_whether_a_token_is_named() -> None:
    assert TokenUri(token="a").names_a_token
    assert TokenUri(slot_id=0).names_a_token
    assert not TokenUri(object="a", id=b"1", type="private", module_path="/x", pin_source="/y").names_a_token
