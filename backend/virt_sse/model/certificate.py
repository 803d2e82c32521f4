"""Deletion certificates: what was destroyed, under which keys, and which copies remain; signed by a host.

The format is normative in ``backend/docs/formats.md``.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Literal, Self
from uuid import UUID

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from virt_sse.errors import CertificateError, InvalidValueError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import EncryptionType
from virt_sse.system.documents import DocumentError, from_json

_CONTEXT = b"virt-sse deletion certificate v1\n"
_KEY_BYTES = 32


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """A part of a certificate."""


class CertifiedDek(_Part, frozen=True, kw_only=True):
    """A DEK that was destroyed.

    :ivar keys: all key versions known to have wrapped the DEK, ``PROVIDER:NAME:VERSION``, the newest last.
    """

    slot: str
    cipher: str
    keys: tuple[str, ...]


class RemainingCopy(_Part, frozen=True, kw_only=True):
    """A disk, snapshot, image or backup with the same content, under other DEKs."""

    kind: str
    id: UUID
    name: str


class CertifiedDisk(_Part, frozen=True, kw_only=True):
    """The disk that was deleted."""

    id: UUID
    name: str
    path: str
    format: DiskFormat
    size: int
    encryption_type: EncryptionType
    encryption_set: UUID | None
    created: str


class DeletionStatement(_Part, frozen=True, kw_only=True):
    """The signed content of a certificate.

    :ivar host: name of the host that deleted the disk.
    :ivar deleted: time of the end of the deletion, ISO 8601 in UTC.
    :ivar image: ``erased``: the LUKS header and all keyslots of the image were overwritten, and the image
        removed; ``missing``: there was no image to erase.
    :ivar remaining: the copies that the host's store knew at that time.
    """

    version: Literal[1] = 1
    host: str
    deleted: str
    disk: CertifiedDisk
    image: Literal["erased", "missing"]
    deks: tuple[CertifiedDek, ...]
    remaining: tuple[RemainingCopy, ...]

    def canonical(self) -> bytes:
        """The bytes to be signed, without the context: all fields, sorted, without white space, in UTF-8."""
        document = msgspec.to_builtins(self)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Decode a statement.

        :raise CertificateError: When *text* is not a statement.
        """
        try:
            return from_json(text, cls)
        except DocumentError as exc:
            raise CertificateError(f"not a deletion statement: {exc}") from exc


class _Signature(_Part, frozen=True, kw_only=True):
    algorithm: Literal["Ed25519"] = "Ed25519"
    public_key: str
    value: str


class DeletionCertificate(_Part, frozen=True, kw_only=True):
    """A statement and its signature."""

    statement: DeletionStatement
    signature: _Signature

    @classmethod
    def sign(cls, statement: DeletionStatement, key: Ed25519PrivateKey) -> Self:
        """Sign *statement*."""
        value = key.sign(_CONTEXT + statement.canonical())
        return cls(
            statement=statement,
            signature=_Signature(
                public_key=encode_public_key(key.public_key()), value=base64.b64encode(value).decode()
            ),
        )

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Decode a certificate; the signature is not verified.

        :raise CertificateError: When *text* is not a certificate.
        """
        try:
            return from_json(text, cls)
        except DocumentError as exc:
            raise CertificateError(f"not a deletion certificate: {exc}") from exc

    def encode(self) -> bytes:
        """The certificate as a JSON document for people and programs, ending in a newline."""
        return (json.dumps(msgspec.to_builtins(self), indent=2, ensure_ascii=False) + "\n").encode()

    def verify(self, key: Ed25519PublicKey) -> DeletionStatement:
        """Verify the signature with a trusted key.

        :raise CertificateError: When another key signed the certificate, or the statement was altered.
        """
        if self.signature.public_key != encode_public_key(key):
            raise CertificateError(
                f"the certificate was signed with another key, {self.signature.public_key[:64]}",
                hint="pass --public-key with the key of the host that deleted the disk",
            )
        try:
            value = base64.b64decode(self.signature.value, validate=True)
            key.verify(value, _CONTEXT + self.statement.canonical())
        except (binascii.Error, ValueError, InvalidSignature) as exc:
            raise CertificateError("the certificate was altered: its signature is invalid") from exc
        return self.statement


def encode_public_key(key: Ed25519PublicKey) -> str:
    """The 32 bytes of a public key (RFC 8032 §5.1.5) in base64."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def parse_public_key(text: str) -> Ed25519PublicKey:
    """Decode a public key in base64.

    :raise InvalidValueError: When *text* is not a public key.
    """
    try:
        raw = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _KEY_BYTES:
        raise InvalidValueError(
            f"invalid public key {text.strip()[:64]!r}",
            hint="32 bytes in base64, see 'certificate public-key'",
        )
    return Ed25519PublicKey.from_public_bytes(raw)
