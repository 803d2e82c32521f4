"""The token issuer: client assertions in (RFC 7523 §2.2), access tokens out (RFC 6749 §4.4)."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping

import jwt
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from virt_sse.errors import VaultError
from virt_sse.vault.home.database import Database, insert_new
from virt_sse.vault.home.sealing import Sealer
from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.home.tables import assertions, principals, sealed_secrets
from virt_sse.vault.identity.principals import Principal, Principals, load_assertion_key
from virt_sse.vault.refusals import unauthorized

TOKEN_SECONDS = 900
"""The default and longest lifetime of an access token."""

_ASSERTION_SECONDS = 600
_SKEW_SECONDS = 60
_ALGORITHM = "ES256"
_CLAIMS = ["aud", "iss", "iat", "nbf", "exp", "jti", "tid", "oid", "appid"]
_ASSERTION_CLAIMS = ["aud", "iss", "sub", "exp", "jti"]
_SIGNING_KEY = "token-signing-key"
_LONGEST_JTI = 256

GRANT = "client_credentials"
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


class OAuthError(Exception):
    """An error response of the token endpoint (RFC 6749 §5.2)."""

    def __init__(self, status: int, error: str, description: str) -> None:
        super().__init__(description)
        self.status = status
        self.error = error
        self.description = description

    def body(self) -> dict[str, object]:
        """Build the response's body."""
        return {"error": self.error, "error_description": self.description}


class TokenIssuer:
    """Issues and verifies access tokens. Thread-safe.

    :param seconds: lifetime of a token.
    """

    def __init__(
        self,
        settings: VaultSettings,
        database: Database,
        principals: Principals,
        sealer: Sealer,
        *,
        seconds: int = TOKEN_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 1 <= seconds <= TOKEN_SECONDS:
            raise VaultError(f"access tokens are good for 1 to {TOKEN_SECONDS} seconds, not {seconds}")
        self._settings = settings
        self._database = database
        self._principals = principals
        self._seconds = seconds
        self._clock = clock
        self._key = signing_key(database, sealer)
        self._public = self._key.public_key()
        point = self._public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self._key_id = hashlib.sha256(point).hexdigest()[:32]

    def jwks(self) -> dict[str, object]:
        """Return the public key of token signatures, as a JSON Web Key Set (RFC 7517 §5)."""
        key: dict[str, object] = jwt.algorithms.ECAlgorithm.to_jwk(self._public, as_dict=True)
        return {"keys": [key | {"kid": self._key_id, "use": "sig", "alg": _ALGORITHM}]}

    def metadata(self) -> dict[str, object]:
        """Return the OpenID Connect Discovery document, with the fields for token requests."""
        base = f"{self._settings.url}/{self._settings.tenant}"
        return {
            "issuer": self._settings.issuer,
            "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
            "token_endpoint": self._settings.token_endpoint,
            "jwks_uri": f"{base}/discovery/v2.0/keys",
            "token_endpoint_auth_methods_supported": ["private_key_jwt"],
            "token_endpoint_auth_signing_alg_values_supported": ["ES256", "PS256", "RS256"],
            "grant_types_supported": [GRANT],
            "response_types_supported": ["token"],
            "subject_types_supported": ["pairwise"],
            "id_token_signing_alg_values_supported": [_ALGORITHM],
        }

    def issue(self, form: Mapping[str, str]) -> tuple[Principal, dict[str, object]]:
        """Answer a token request.

        :return: the principal, and the response's body.
        :raise OAuthError: When the request is refused.
        :raise Refusal: When the database fails.
        """
        if form.get("grant_type") != GRANT:
            raise OAuthError(400, "unsupported_grant_type", f"the grant type must be {GRANT}")
        if form.get("client_assertion_type") != ASSERTION_TYPE:
            raise OAuthError(400, "invalid_request", "a client authenticates with a signed assertion")
        if form.get("scope") != f"{self._settings.audience}/.default":
            raise OAuthError(400, "invalid_scope", f"the scope must be {self._settings.audience}/.default")
        principal = self._authenticate(form.get("client_id", ""), form.get("client_assertion", ""))
        return principal, {
            "token_type": "Bearer",
            "expires_in": self._seconds,
            "ext_expires_in": self._seconds,
            "access_token": self._token(principal),
        }

    def principal_of(self, token: str) -> Principal:
        """Verify an access token, and return its principal.

        :raise Refusal: 401, when the token is invalid, or its principal is disabled, expired or deleted.
        """
        try:
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[_ALGORITHM],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                options={"require": _CLAIMS},
            )
        except jwt.ExpiredSignatureError:
            raise unauthorized("The token has expired.") from None
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise unauthorized("The token is not a token of this vault.") from None
        principal = self._principals.find(str(claims["oid"]))
        if (
            claims["tid"] != self._settings.tenant
            or principal is None
            or claims["appid"] != principal.client_id
        ):
            raise unauthorized("The token's principal is not known here.")
        if not principal.active(self._clock()):
            raise unauthorized("The token's principal is disabled or has expired.")
        return principal

    def _token(self, principal: Principal) -> str:
        now = int(self._clock())
        claims = {
            "aud": self._settings.audience,
            "iss": self._settings.issuer,
            "iat": now - _SKEW_SECONDS,  # as in Azure: another instance's clock may be behind
            "nbf": now - _SKEW_SECONDS,
            "exp": now + self._seconds,
            "jti": secrets.token_hex(16),
            "tid": self._settings.tenant,
            "oid": principal.object_id,
            "sub": principal.object_id,
            "appid": principal.client_id,
            "ver": "2.0",
        }
        return jwt.encode(claims, self._key, _ALGORITHM, headers={"kid": self._key_id})

    def _authenticate(self, client_id: str, assertion: str) -> Principal:
        refused = OAuthError(401, "invalid_client", "the client assertion is not valid")
        principal = self._principals.find(client_id)
        if principal is None or principal.client_id != client_id or not principal.active(self._clock()):
            raise refused
        key = load_assertion_key(principal.public_key)
        try:
            claims = jwt.decode(
                assertion,
                key,
                algorithms=["ES256"] if isinstance(key, ec.EllipticCurvePublicKey) else ["RS256", "PS256"],
                audience=self._settings.token_endpoint,
                issuer=client_id,
                leeway=_SKEW_SECONDS,
                options={"require": _ASSERTION_CLAIMS},
            )
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
            raise _other_clock() from None
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise refused from None
        if claims["sub"] != client_id:
            raise refused
        if int(claims["exp"]) > self._clock() + _ASSERTION_SECONDS + _SKEW_SECONDS:
            raise _other_clock()
        if len(str(claims["jti"])) > _LONGEST_JTI or not self._first_time(
            client_id, str(claims["jti"]), claims["exp"]
        ):
            raise refused
        return principal

    def _first_time(self, client_id: str, jti: str, expires: int) -> bool:
        """Record the use of an assertion for as long as it is valid; return whether this is its first use."""
        digest = hashlib.sha256(f"{client_id}\0{jti}".encode(errors="surrogatepass")).digest()
        with self._database.recording() as connection:
            old = int(self._clock()) - 2 * _SKEW_SECONDS
            connection.execute(assertions.delete().where(assertions.c.expires < old))
            return insert_new(connection, assertions, digest=digest, expires=int(expires))


def _other_clock() -> OAuthError:
    """An error for a correctly signed assertion whose times disagree with the vault's clock.

    The response denies nothing: a host with a wrong clock must not have its guests shut down.
    """
    return OAuthError(400, "invalid_grant", "the client assertion's times disagree with the vault's clock")


def bearer(header: str) -> str | None:
    """Return the bearer token of an Authorization header; ``None`` for other schemes."""
    match = re.fullmatch(r"[Bb]earer +([A-Za-z0-9._~+/=-]+)", header)
    return match[1] if match else None


def new_signing_key(database: Database, sealer: Sealer) -> None:
    """Make the signing key of access tokens, which marks the database as a vault's of this root key.

    :raise VaultError: When the database has a vault already.
    :raise Refusal: When the database fails.
    """
    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NoEncryption()
    )
    with database.writing() as connection:
        sealed = sealer.seal(der, _SIGNING_KEY.encode())
        if not insert_new(connection, sealed_secrets, name=_SIGNING_KEY, sealed=sealed):
            raise VaultError(
                "the database has a vault already",
                hint="'virt-sse vault import-root' makes a further instance of a vault; "
                "'virt-sse vault init' needs an empty database",
            )


def remove_vault(database: Database, sealer: Sealer) -> None:
    """Remove what an interrupted ``vault init`` left in a database; nothing of another vault.

    :raise Refusal: When the database fails.
    """
    with contextlib.suppress(VaultError):
        signing_key(database, sealer)  # made by the interrupted command
        with database.writing() as connection:
            connection.execute(principals.delete())
            connection.execute(sealed_secrets.delete())


def signing_key(database: Database, sealer: Sealer) -> ec.EllipticCurvePrivateKey:
    """Load the signing key of access tokens from the database.

    :raise VaultError: When the root key is not the original root key of this database, or the database is not
        a vault's.
    :raise Refusal: When the database fails.
    """
    with database.reading() as connection:
        sealed = connection.scalar(
            sa.select(sealed_secrets.c.sealed).where(sealed_secrets.c.name == _SIGNING_KEY)
        )
    if sealed is None:
        raise VaultError("the database is not the database of a vault")
    try:
        loaded = load_der_private_key(sealer.open(sealed, _SIGNING_KEY.encode()), None)
    except VaultError as exc:
        raise VaultError("the vault's root key is not the original root key of this vault") from exc
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise VaultError("the vault's token signing key is not an EC key")
    return loaded
