"""Deletion certificates: canonical form, signature, hostile documents."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from support.folders import VECTORS
from virt_sse.errors import CertificateError, InvalidValueError
from virt_sse.model.certificate import (
    DeletionCertificate,
    DeletionStatement,
    encode_public_key,
    parse_public_key,
)

VECTOR = json.loads((VECTORS / "deletion_certificate.json").read_text())
KEY = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTOR["private-key"]))
CERTIFICATE = json.dumps(VECTOR["certificate"]).encode()


def test_the_vector_is_signed_and_verified_as_recorded() -> None:
    certificate = DeletionCertificate.parse(CERTIFICATE)
    statement = certificate.verify(KEY.public_key())
    assert statement.canonical().decode() == VECTOR["canonical"]
    assert DeletionCertificate.sign(statement, KEY) == certificate
    assert DeletionCertificate.parse(certificate.encode()) == certificate
    assert DeletionStatement.parse(statement.canonical()) == statement


def test_the_text_of_a_certificate_has_no_influence_on_its_signature() -> None:
    shuffled = dict(reversed(VECTOR["certificate"]["statement"].items()))
    text = json.dumps({"signature": VECTOR["certificate"]["signature"], "statement": shuffled}, indent=7)
    DeletionCertificate.parse(text.encode()).verify(KEY.public_key())


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all scalars in a document."""
    if isinstance(value, dict):
        return [leaf for name, each in value.items() for leaf in leaves(each, (*path, name))]
    if isinstance(value, list):
        return [leaf for number, each in enumerate(value) for leaf in leaves(each, (*path, number))]
    return [path]


@pytest.mark.parametrize("path", leaves(VECTOR["certificate"]), ids=str)
def test_a_certificate_altered_anywhere_is_refused(path: tuple[Any, ...]) -> None:
    altered = json.loads(CERTIFICATE)
    place = altered
    for key in path[:-1]:
        place = place[key]
    value = place[path[-1]]
    place[path[-1]] = value + 1 if isinstance(value, int) else f"x{value}"
    with pytest.raises(CertificateError):
        DeletionCertificate.parse(json.dumps(altered).encode()).verify(KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["statement"].pop("remaining"),
        lambda document: document["statement"].update(more=1),
        lambda document: document["statement"]["remaining"].clear(),
        lambda document: document["statement"]["deks"].clear(),
        lambda document: document.pop("signature"),
        lambda document: document["signature"].update(value=""),
    ],
)
def test_a_certificate_with_parts_added_or_left_out_is_refused(change: Any) -> None:
    document = json.loads(CERTIFICATE)
    change(document)
    with pytest.raises(CertificateError):
        DeletionCertificate.parse(json.dumps(document).encode()).verify(KEY.public_key())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff" * 64,
        CERTIFICATE[:-2],
        CERTIFICATE.replace(b'"version": 1', b'"version": 1, "version": 1'),
    ],
)
def test_a_malformed_certificate_is_refused(text: bytes) -> None:
    with pytest.raises(CertificateError, match="not a deletion certificate"):
        DeletionCertificate.parse(text)


def test_only_the_trusted_key_counts() -> None:
    other = Ed25519PrivateKey.generate()
    forged = DeletionCertificate.sign(DeletionCertificate.parse(CERTIFICATE).statement, other)
    with pytest.raises(CertificateError, match="signed with another key"):
        forged.verify(KEY.public_key())
    assert forged.verify(parse_public_key(encode_public_key(other.public_key())))


@pytest.mark.parametrize("text", ["", "x", "AAAA", "=" * 44, "ä" * 44])
def test_an_invalid_public_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid public key"):
        parse_public_key(text)
