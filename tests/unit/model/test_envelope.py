"""The body of an envelope is untrusted: a field of any type in any place is refused, never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from virt_sse.errors import EnvelopeError
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType

BODY: dict[str, Any] = {
    "disk": "6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1",
    "name": "db-01",
    "encryption-type": "EncryptionAtRestWithPlatformAndCustomerKeys",
    "created": "2026-01-31T12:00:00+00:00",
    "encryption-set": "0d5a3f2e-6a5b-4f0c-8e43-2b1f3a9c7d11",
    "deks": [
        {
            "slot": "service",
            "cipher": "aes-256-xts",
            "key": ["vault", "https://vault.example/keys/k", "1"],
            "alg": "A256KW",
            "dek": "AAEC",
        },
        {
            "slot": "infrastructure",
            "cipher": "aes-256-cbc-essiv:sha256",
            "key": ["platform-managed", "default", "2"],
            "alg": "A256KW",
            "dek": "/v8=",
        },
    ],
}
ENVELOPE = Envelope(
    disk_id=UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1"),
    name="db-01",
    encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    set_id=UUID("0d5a3f2e-6a5b-4f0c-8e43-2b1f3a9c7d11"),
    created=datetime(2026, 1, 31, 12, tzinfo=UTC),
    generation=7,
    deks=(
        DekEntry(
            "service",
            AES_256_XTS,
            WrappedDek(b"\0\1\2", "A256KW", KeyId("vault", "https://vault.example/keys/k", "1")),
        ),
        DekEntry(
            "infrastructure",
            AES_256_CBC,
            WrappedDek(b"\xfe\xff", "A256KW", KeyId("platform-managed", "default", "2")),
        ),
    ),
)

Place = tuple[str | int, ...]

VALUES = {
    "null": "null",
    "true": "true",
    "false": "false",
    "0": "0",
    "integer": "5",
    "float": "1.5",
    "NaN": "NaN",
    "400 digits": "9" * 400,
    "huge exponent": "1e999",
    "empty string": '""',
    "string": '"abc"',
    "lone surrogate": r'"\ud800"',
    "empty list": "[]",
    "list": "[5]",
    "list of nulls": "[null, null, null]",
    "empty object": "{}",
    "object": '{"a": {}, "b": [], "c": null}',
    "deep list": "[" * 400 + "]" * 400,
}
VALID = {
    (("name",), "empty string"),
    (("name",), "string"),
    (("encryption-set",), "null"),
    (("encryption-set",), "empty string"),
    (("deks",), "empty list"),
    *((("deks", 0, field), value) for field in ("slot", "alg") for value in ("empty string", "string")),
    *((("deks", 0, "key", part), value) for part in (0, 1, 2) for value in ("empty string", "string")),
    (("deks", 0, "dek"), "empty string"),
}


def places(value: object, place: Place = ()) -> Iterator[Place]:
    yield place
    if isinstance(value, dict):
        for name, each in value.items():
            yield from places(each, (*place, name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*place, number))


def slot(body: str, generation: int = 7) -> bytes:
    content = struct.pack(">8sHHQ", b"virt-sse", 1, len(body.encode()), generation) + body.encode()
    return content + hashlib.sha256(content).digest()


def replaced(place: Place, value: str) -> str:
    """The text of :data:`BODY` with the JSON text *value* at *place*."""
    document = [copy.deepcopy(BODY)]
    parent: Any = document
    for part in (path := (0, *place))[:-1]:
        parent = parent[part]
    parent[path[-1]] = "PLACEHOLDER"
    return json.dumps(document[0]).replace('"PLACEHOLDER"', value)


def test_an_envelope_is_decoded() -> None:
    assert Envelope.decode(slot(json.dumps(BODY))) == ENVELOPE


def test_the_encoding_is_compact_json() -> None:
    compact = slot(json.dumps(BODY, separators=(",", ":")))
    assert ENVELOPE.encode() == compact.ljust(len(ENVELOPE.encode()), b"\0")


def test_unknown_fields_are_ignored() -> None:
    body = copy.deepcopy(BODY) | {"later": [{"a": 1}]}
    body["deks"][0]["later"] = None
    assert Envelope.decode(slot(json.dumps(body))) == ENVELOPE


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", [place for place in places(BODY) if place[:2] != ("deks", 1)])
def test_a_field_of_another_type_is_refused(place: Place, value: str) -> None:
    encoded = slot(replaced(place, VALUES[value]))
    if (place, value) in VALID:
        Envelope.decode(encoded)
        return
    with pytest.raises(EnvelopeError, match="invalid envelope"):
        Envelope.decode(encoded)


@pytest.mark.parametrize("place", [place for place in places(BODY) if place and isinstance(place[-1], str)])
def test_a_missing_field_is_refused_except_for_the_encryption_set(place: Place) -> None:
    body: Any = copy.deepcopy(BODY)
    parent = body
    for part in place[:-1]:
        parent = parent[part]
    del parent[place[-1]]
    if place == ("encryption-set",):
        assert Envelope.decode(slot(json.dumps(body))).set_id is None
        return
    with pytest.raises(EnvelopeError, match=f"missing required field `{place[-1]}`"):
        Envelope.decode(slot(json.dumps(body)))


def double_under_rsa_4096(*, name: str = "d" * 80, url: str) -> Envelope:
    first, second = ENVELOPE.deks
    version = "0123456789abcdef" * 2
    customers = WrappedDek(bytes(range(256)) * 2, "RSA-OAEP-256", KeyId("customer-managed", url, version))
    platforms = WrappedDek(bytes(72), "A256KW", KeyId("platform-managed", "default", version))
    deks = (dataclasses.replace(first, wrapped=customers), dataclasses.replace(second, wrapped=platforms))
    return dataclasses.replace(ENVELOPE, name=name, deks=deks)


@pytest.mark.parametrize("length", [20, 105, 106, 181, 405])
def test_a_double_disk_under_rsa_4096_has_room_for_long_names(length: int) -> None:
    """Azure's longest URL of a key has 181 characters: 24 of the vault's name, 127 of the key's."""
    envelope = double_under_rsa_4096(url="https://vault.example/keys/".ljust(length, "k"))
    content = envelope.encode()
    assert Envelope.decode(content) == envelope
    assert content[9] == (1 if length <= 105 else 2)


def test_an_envelope_without_room_is_refused_with_the_limit() -> None:
    with pytest.raises(EnvelopeError, match="the image's header has room for 1484") as caught:
        double_under_rsa_4096(url="k" * 500).encode()
    assert "shorter name or URL" in str(caught.value.hint)
