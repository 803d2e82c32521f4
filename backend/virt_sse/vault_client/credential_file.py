"""A credential file: all that is needed to speak to one vault as one principal. JSON, 0600."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from virt_sse.errors import CredentialError
from virt_sse.system.files import write_private

_FORMAT = "virt-sse-vault-credential-1"
_ASSERTION_SECONDS = 300


@dataclass(frozen=True, slots=True)
class CredentialFile:
    """:ivar vault_url: the one vault that it is for.
    :ivar ca_certificate: in PEM; no other authority is trusted for that vault.
    :ivar audience: what tokens are asked for.
    :ivar token_endpoint: the one place where assertions go.
    :ivar private_key: in PEM; signs assertions.
    :ivar expires: when the principal does; seconds since 1970.
    """

    vault_url: str
    ca_certificate: str = field(repr=False)
    audience: str
    tenant: str
    client_id: str
    object_id: str
    token_endpoint: str
    private_key: str = field(repr=False)
    expires: int | None

    def __post_init__(self) -> None:
        for url in (self.vault_url, self.token_endpoint):
            if not url.startswith("https://"):
                raise CredentialError("a credential file's URLs must be https")
        if origin(self.vault_url) != origin(self.token_endpoint):
            raise CredentialError("a credential file's token endpoint must be its vault's own")

    @classmethod
    def read(cls, path: Path) -> Self:
        """:raise CredentialError: When it cannot be read, is open to others, or is none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                if os.fstat(descriptor).st_mode & 0o077:
                    raise CredentialError(
                        f"the credential file {path} is open to others", hint=f"chmod go= {path}"
                    )
                document = json.loads(file.read())
        except OSError as exc:
            raise CredentialError(f"cannot read the credential file {path}: {exc.strerror}") from exc
        except (ValueError, RecursionError):
            raise CredentialError(f"{path} is no credential file") from None  # its content is secret
        names = {each.name for each in dataclasses.fields(cls)}
        if (
            not isinstance(document, dict)
            or document.pop("format", None) != _FORMAT
            or set(document) != names
        ):
            raise CredentialError(f"{path} is no credential file that this version reads")
        expires = document["expires"]
        texts = all(isinstance(document[name], str) for name in names - {"expires"})
        if not texts or not (expires is None or isinstance(expires, int)):
            raise CredentialError(f"{path} is no credential file that this version reads")
        return cls(**document)

    def write(self, path: Path) -> None:
        """Replace *path*.

        :raise CredentialError: When it cannot be written.
        """
        document = {"format": _FORMAT} | dataclasses.asdict(self)
        try:
            write_private(path, json.dumps(document, indent=2).encode() + b"\n")
        except OSError as exc:
            raise CredentialError(f"cannot write the credential file {path}: {exc.strerror}") from exc

    def assertion(self) -> str:
        """A new client assertion (RFC 7523 §3), for the token endpoint of this file, good for one use.

        :raise CredentialError: When the private key is none that it could be signed with.
        """
        try:
            key = load_pem_private_key(self.private_key.encode(), None)
        except (ValueError, TypeError):
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
        return jwt.encode(claims, key, "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "PS256")

    def covers(self, url: str) -> bool:
        """Whether *url* is of this file's vault. To no other goes anything that comes from this file."""
        try:
            return origin(url) == origin(self.vault_url)
        except ValueError:
            return False


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port.

    :raise ValueError: When *url* is none with a host.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a host and nothing before it is needed")
    return parts.scheme.lower(), parts.hostname.lower(), parts.port or 443


def new_assertion_key() -> tuple[str, str]:
    """A new key for assertions: the private one, and the public one that the vault is told; in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()
