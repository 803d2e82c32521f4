"""Azure's JSON, as callers send it."""

from __future__ import annotations

import pytest

from virt_sse.vault import properties
from virt_sse.vault.http import wire
from virt_sse.vault.refusals import Refusal


def refused(action: object) -> None:
    with pytest.raises(Refusal) as refusal:
        action()  # type: ignore[operator]
    assert refusal.value.status == 400
    assert refusal.value.body()["error"]["code"] == "BadParameter"  # type: ignore[index]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 60_000, b'{"a":' * 10_000, b"1" * 60_000]
)
def test_a_body_must_be_an_object(body: bytes) -> None:
    refused(lambda: wire.parse(body))


def test_no_body_is_an_empty_object() -> None:
    assert wire.parse(b"") == {}


@pytest.mark.parametrize("value", [b"", b"\0", b"a" * 63, bytes(range(256)) * 2])
def test_base64url_decodes_to_the_encoded_bytes(value: bytes) -> None:
    text = wire.encode(value)
    assert "=" not in text
    assert wire.decode({"value": text}, "value") == value
    assert wire.decode({"value": text + "=" * (-len(text) % 4)}, "value") == value


@pytest.mark.parametrize(
    "value", ["a", "ab+/", "a b", "ä", "ab\n", "===", "a=b", None, 5, ["YQ"], {"x": 1}, "a" * 5]
)
def test_invalid_base64url_is_refused(value: object) -> None:
    refused(lambda: wire.decode({"value": value}, "value"))


@pytest.mark.parametrize(
    "attributes",
    [
        {"enabled": "yes"},
        {"enabled": 1},
        {"nbf": "tomorrow"},
        {"exp": -1},
        {"exp": 1.5},
        {"exp": True},
        {"exp": 10**30},
        {"exportable": True},
        [],
        "enabled",
    ],
)
def test_invalid_attributes_are_refused(attributes: object) -> None:
    refused(lambda: wire.attributes({"attributes": attributes}))


def test_attributes_that_are_not_given_are_not_changed() -> None:
    assert wire.attributes({}) == {}
    assert wire.attributes({"attributes": None}) == {}
    assert wire.attributes({"attributes": {"enabled": None}}) == {}
    assert wire.attributes({"attributes": {"exp": None, "nbf": 5}}) == {"expires": None, "not_before": 5}


@pytest.mark.parametrize(
    "tags",
    [{"a": 1}, {"a": None}, {"a": "x" * 257}, {"x" * 257: ""}, {str(n): "" for n in range(16)}, [], "a"],
)
def test_invalid_tags_are_refused(tags: object) -> None:
    refused(lambda: wire.tags({"tags": tags}))


@pytest.mark.parametrize("operations", ["wrapKey", ["wrap"], [1], {}, ["wrapKey", None], [["wrapKey"]]])
def test_invalid_operations_are_refused(operations: object) -> None:
    refused(lambda: wire.operations({"key_ops": operations}))


@pytest.mark.parametrize("kty", ["", "rsa", "RSA ", None, 5])
def test_an_invalid_key_type_is_refused(kty: object) -> None:
    refused(lambda: wire.key_type({"kty": kty}))


@pytest.mark.parametrize("size", ["2048", 2048.0, True, [2048]])
def test_an_invalid_number_is_refused(size: object) -> None:
    refused(lambda: properties.integer({"key_size": size}, "key_size", 2048))


def test_a_refusal_has_azure_s_form() -> None:
    refusal = Refusal(403, "Forbidden", "Not this one.", inner="KeyDisabled")
    assert refusal.body() == {
        "error": {"code": "Forbidden", "message": "Not this one.", "innererror": {"code": "KeyDisabled"}}
    }
