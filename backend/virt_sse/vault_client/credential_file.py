"""A credential file: address, trust anchor and private key for one principal of one vault. JSON, 0600."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Self

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from virt_sse.errors import CredentialError
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import write_private
from virt_sse.vault_client.exchange import origin
from virt_sse.vault_client.secret_files import read_secret_file

_FORMAT = "virt-sse-vault-credential-1"
_ASSERTION_SECONDS = 300


class CredentialFile(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format", tag=_FORMAT
):
    """A principal's credential for one vault.

    :ivar vault_url: the vault's URL.
    :ivar ca_certificate: the only trusted authority for the vault; PEM.
    :ivar audience: the audience of access tokens.
    :ivar token_endpoint: the only recipient of assertions.
    :ivar private_key: signs assertions; PEM.
    :ivar expires: when the principal expires; seconds since 1970.
    """

    vault_url: str
    ca_certificate: str
    audience: str
    tenant: str
    client_id: str
    object_id: str
    token_endpoint: str
    private_key: str
    expires: int | None

    def __repr__(self) -> str:
        return f"CredentialFile({self.client_id!r} at {self.vault_url!r})"  # without the private key

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("client_id", self.client_id), ("vault_url", self.vault_url)]

    def __post_init__(self) -> None:
        for url in (self.vault_url, self.token_endpoint):
            if not url.startswith("https://"):
                raise CredentialError("a credential file's URLs must be https")
        if origin(self.vault_url) != origin(self.token_endpoint):
            raise CredentialError("a credential file's token endpoint must belong to its vault")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the credential file *path*.

        :raise CredentialError: When the file cannot be read, is open to others, or is malformed.
        """
        try:
            return from_json(read_secret_file(path, "credential file"), cls)
        except DocumentError as exc:
            raise CredentialError(f"{path} is no credential file of a known version: {exc}") from None

    def write(self, path: Path) -> None:
        """Write the credential to *path*, replacing the file.

        :raise CredentialError: When the file cannot be written.
        """
        try:
            write_private(path, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        except OSError as exc:
            raise CredentialError(f"cannot write the credential file {path}: {exc.strerror}") from exc

    def assertion(self) -> str:
        """Sign a new client assertion (RFC 7523 §3), for the file's token endpoint and for one use.

        :raise CredentialError: When the private key is malformed or of an unsupported type.
        """
        try:
            key = load_pem_private_key(self.private_key.encode(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise CredentialError("the credential file's private key cannot be read") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise CredentialError("the credential file's private key is neither EC nor RSA")
        now = int(time.time())
        claims = {
            "aud": self.token_endpoint,
            "iss": self.client_id,
            "sub": self.client_id,
            "iat": now,
            "exp": now + _ASSERTION_SECONDS,
            "jti": secrets.token_hex(16),
        }
        try:
            return jwt.encode(
                claims, key, "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "PS256"
            )
        except jwt.InvalidKeyError:
            raise CredentialError("the credential file's private key is not of the curve P-256") from None

    def covers(self, url: str) -> bool:
        """Check that *url* belongs to the file's vault; tokens and assertions must not go to another URL."""
        try:
            return origin(url) == origin(self.vault_url)
        except ValueError:
            return False


def new_assertion_key() -> tuple[str, str]:
    """Make a key pair for assertions; returns the private and the public key in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()
