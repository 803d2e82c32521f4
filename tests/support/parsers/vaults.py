"""Parsers of a vault, and of a vault's client."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jwt
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from support.fuzzing import Parse, Parser, always, texts
from support.vault_doubles import Records
from virt_sse.errors import InvalidValueError, KeyProviderError, VaultError, VirtSseError
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.http import identity_api, key_api, wire
from virt_sse.vault.http.calls import Call, Handler
from virt_sse.vault.http.requests import correlation_of, disk_of
from virt_sse.vault.identity.principals import load_assertion_key
from virt_sse.vault.identity.tokens import ASSERTION_TYPE, GRANT, OAuthError, bearer
from virt_sse.vault.initialise import initialise
from virt_sse.vault.keys.durations import seconds_of
from virt_sse.vault.keys.records import NewKey, check_name, check_version
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.vault import Vault, open_vault
from virt_sse.vault_client.administration import _decoded, _PolicyList, _PrincipalList
from virt_sse.vault_client.credential import issued_token
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.exchange import document_of
from virt_sse.vault_client.https import Response, VaultConnection, checked, describe
from virt_sse_plugins.key_providers.transit_answers import TransitAnswer
from virt_sse_plugins.key_providers.transit_keys import TransitKey, TransitPath
from virt_sse_plugins.key_providers.transit_login import TransitToken

_KEY = {
    "kty": "RSA",
    "n": "AQ" * 171,
    "e": "AQAB",
    **dict.fromkeys(("d", "p", "q", "dp", "dq", "qi"), "AQAB"),
}
_DOCUMENTS: list[dict[str, object]] = [
    {
        "kty": "RSA",
        "key_size": 1,
        "key_ops": ["wrapKey"],
        "attributes": {"enabled": True, "exp": 1},
        "tags": {"a": "b"},
    },
    {"key": _KEY, "tags": {"a": "b"}, "Hsm": False},
    {"alg": "RSA-OAEP-256", "value": "AAAA"},
    {
        "lifetimeActions": [{"trigger": {"timeAfterCreate": "P30D"}, "action": {"type": "Rotate"}}],
        "attributes": {"expiryTime": "P90D"},
    },
    {"name": "web", "public_key": new_assertion_key()[1], "role": "none", "expires": 1_900_000_000},
    {
        "enabled": False,
        "expires": None,
        "permissions": ["get"],
        "grant": ["wrapKey"],
        "revoke": [],
        "count": 8,
    },
]
_HANDLERS: list[Handler] = [
    *(key_api.import_key, key_api.update, key_api.restore, key_api.set_policy, key_api.random_bytes),
    *(key_api.encrypt, key_api.wrap, key_api.decrypt, key_api.unwrap, key_api.unsupported),
    *(identity_api.change_principal, identity_api.set_policy, identity_api.adjust_policy),
    identity_api.create_principal,
]


@contextlib.contextmanager
def _vault(folder: Path) -> Iterator[tuple[Vault, VaultDirectory]]:
    directory = initialise(folder / f"vault-{secrets.token_hex(4)}")
    with open_vault(directory, Records()) as vault:
        yield vault, directory


def _require_refusal(refusal: Refusal, *, is_document: bool) -> None:
    assert refusal.status < 500, refusal.message
    assert is_document or refusal.status == 400
    json.dumps(refusal.body())


@contextlib.contextmanager
def _requests(folder: Path) -> Iterator[Parse]:
    """The bodies of all requests, after authentication."""
    with _vault(folder) as (vault, directory):
        administrator = vault.principals.get(CredentialFile.read(directory.administrator_path).client_id)
        vault.principals.create("web", new_assertion_key()[1])
        vault.keys.create("kek", "RSA", 2048, NewKey())

        def parse(content: bytes) -> None:
            try:
                document = wire.parse(content)
            except Refusal:
                document = None
            for handler in _HANDLERS:
                name = "web" if handler.__module__ == identity_api.__name__ else "kek"
                call = Call(vault, administrator, {"name": name}, {}, content)
                try:
                    json.dumps(handler(call).body)
                except Refusal as refusal:
                    _require_refusal(refusal, is_document=document is not None)
            for principal in vault.principals.all():
                if principal.client_id != administrator.client_id and principal.name != "web":
                    vault.principals.delete(principal)

        yield parse


@contextlib.contextmanager
def _access_tokens(folder: Path) -> Iterator[Parse]:
    """Access tokens that the vault has not signed, or with a form of their own."""
    with _vault(folder) as (vault, _):
        yield lambda content: vault.tokens.principal_of(bearer(f"Bearer {content.decode('latin-1')}") or "")


@contextlib.contextmanager
def _claims(folder: Path) -> Iterator[Parse]:
    """Client assertions with any claims, correctly signed by a principal."""
    with _vault(folder) as (vault, directory):
        file = CredentialFile.read(directory.administrator_path)
        key = load_pem_private_key(file.private_key.encode(), None)
        signer = jwt.PyJWS()
        scope = f"{file.audience}/.default"
        replaced = {b"CLIENT": file.client_id, b"ENDPOINT": file.token_endpoint}

        def parse(content: bytes) -> None:
            for word, text in replaced.items():
                content = content.replace(word, text.encode())
            content = content.replace(b"1111", str(int(time.time()) + 60).encode())
            assertion = signer.encode(content, key, "ES256")
            form = {
                "grant_type": GRANT,
                "client_id": file.client_id,
                "client_assertion_type": ASSERTION_TYPE,
                "client_assertion": assertion,
                "scope": scope,
            }
            vault.tokens.issue(form)

        yield parse


def _settings(content: bytes) -> None:
    settings = VaultSettings.from_json(content)
    assert VaultSettings.from_json(settings.to_json()) == settings
    _ = settings.port, settings.issuer, settings.recovery_level


def new_credential() -> bytes:
    """A credential file of a new vault's administrator."""
    with TemporaryDirectory() as folder:
        return initialise(Path(folder) / "vault").administrator_path.read_bytes()


@contextlib.contextmanager
def _credential_file(folder: Path) -> Iterator[Parse]:
    path = folder / "credential.json"
    path.touch(0o600)

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        file = CredentialFile.read(path)
        file.covers("https://vault.example:8443/keys")
        file.assertion()
        VaultConnection(file)._trust()

    yield parse


def _token_answer(content: bytes) -> None:
    """The body of an answer to a request for an access token."""
    token, seconds = issued_token(_response(content).body, "https://vault.example")
    assert bearer(f"Bearer {token}") == token
    assert time.monotonic() + seconds > 0


def _response(content: bytes) -> Response:
    status = 200 + content[0] % 4 * 100 if content else 200
    return Response(status, document_of(content[1:]))


def _management_answer(content: bytes) -> None:
    answer = _response(content)
    assert describe(answer).isprintable()
    body = checked(answer)
    _decoded(body, _PrincipalList if content[:1] == b"\0" else _PolicyList)


def _transit_path(text: str) -> None:
    path = TransitPath.parse(text)
    assert str(path) in text
    assert not {"", ".", ".."} & set(path.operation("decrypt").split("/"))


def _transit_answer(content: bytes) -> None:
    status = 200 + content[0] % 4 * 100 if content else 200
    answer = TransitAnswer.of("https://bao.example", status, content[1:])
    assert str(answer.unavailable()).isprintable()
    token = TransitToken.of(answer, 0.0)
    assert token is None or (token.value.isascii() and token.value.isprintable())
    with contextlib.suppress(KeyProviderError):
        path = TransitPath("transit", "web")
        key = TransitKey.of(answer.data)
        key.algorithm(path)
        key.check_encryption(path, 1)


def _headers(text: str) -> None:
    correlation_of({"x-ms-client-request-id": text})
    disk_of({"x-virt-sse-disk": text})
    bearer(text)


_PRINCIPAL = {
    "client_id": "c",
    "object_id": "o",
    "tenant": "t",
    "name": "n",
    "role": "none",
    "enabled": True,
    "expires": None,
    "created": 1,
    "created_by": None,
}
_TRANSIT_KEY = {"type": "aes256-gcm96", "latest_version": 2, "min_decryption_version": 1}
_TRANSIT_AUTH = {"client_token": "s.t", "lease_duration": 3600, "renewable": True, "token_type": "service"}
_ERROR = {"error": {"code": "Forbidden", "message": "No.", "innererror": {"code": "KeyDisabled"}}}
_SETTINGS = VaultSettings(
    name="vault",
    tenant="00000000-0000-0000-0000-000000000001",
    tier="standard",  # type: ignore[arg-type]
    url="https://vault.example:8443",
    audience="https://vault.example",
    hosts=("vault.example", "::1"),
)
_CLAIMS = (
    b'{"iss": "CLIENT", "sub": "CLIENT", "aud": "ENDPOINT", "exp": 1111, "nbf": 1, "iat": 1, "jti": "a"}'
)
_TOKEN = jwt.encode({"aud": "a", "exp": 1}, "k" * 32, headers={"kid": "a"}).encode()

PARSERS = [
    Parser(
        "vault-requests", _requests, [json.dumps(each).encode() for each in _DOCUMENTS], (), document=True
    ),
    Parser("vault-access-token", _access_tokens, [_TOKEN], (Refusal,)),
    Parser("vault-assertion-claims", _claims, [_CLAIMS], (OAuthError, Refusal), document=True),
    Parser("vault-key-name", texts(check_name), [b"kek-1"], (Refusal,)),
    Parser("vault-key-version", texts(check_version), [b"1" * 32], (Refusal,)),
    Parser("vault-durations", texts(seconds_of), [b"P1Y2M3W4DT5H6M7S", b"P90D"], (Refusal,)),
    Parser("vault-public-key", texts(load_assertion_key), [new_assertion_key()[1].encode()], (Refusal,)),
    Parser("vault-headers", texts(_headers), [b"00000000-0000-0000-0000-000000000001", b"Bearer a.b.c"], ()),
    Parser("vault-settings", always(_settings), [_SETTINGS.to_json()], (VirtSseError,), document=True),
    Parser("credential-file", _credential_file, [new_credential()], (VaultError,), document=True),
    Parser(
        "token-answer",
        always(_token_answer),
        [b'\0{"access_token": "a.b.c", "expires_in": 900}'],
        document=True,
    ),
    Parser("transit-key-path", texts(_transit_path), [b"team/transit/keys/web/12"], (InvalidValueError,)),
    Parser(
        "transit-answer",
        always(_transit_answer),
        [
            b"\0" + json.dumps({"data": _TRANSIT_KEY}).encode(),
            b"\0" + json.dumps({"auth": _TRANSIT_AUTH}).encode(),
            b"\2" + json.dumps({"errors": ["permission denied"]}).encode(),
        ],
        document=True,
    ),
    Parser(
        "management-answer",
        always(_management_answer),
        [
            b"\0" + json.dumps({"value": [_PRINCIPAL]}).encode(),
            b"\4" + json.dumps({"value": [{"name": "n", "permissions": ["get"]}]}).encode(),
            b"\2" + json.dumps(_ERROR).encode(),
        ],
        document=True,
    ),
]
