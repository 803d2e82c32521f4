"""What the vault makes of bad callers: clear answers, no traceback, nothing lost."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from support.vault_tools import OAEP, Raw, new_name
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE


@pytest.fixture(scope="module")
def vault(lab_vault: LabVault) -> Iterator[LabVault]:
    """A vault that has said nothing at the end: neither a traceback nor a secret."""
    said_before = lab_vault.log_path.read_text()
    with VaultClient(lab_vault.administrator_path) as client:
        client.grant("administrator", USE)
    yield lab_vault
    said = lab_vault.log_path.read_text().removeprefix(said_before)
    assert "Traceback" not in said
    assert "eyJ" not in said, "a token or an assertion is in the log"


@pytest.fixture(scope="module")
def token(vault: LabVault) -> str:
    return VaultCredential(vault.administrator_path).token()


@pytest.fixture
def ask(vault: LabVault, token: str) -> Iterator[Raw]:
    with Raw(vault, token) as raw:
        yield raw


@pytest.fixture(scope="module")
def key(vault: LabVault, token: str) -> str:
    """The path of a version."""
    with Raw(vault, token) as raw:
        kid = raw("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}).body["key"]["kid"]
    return str(kid.removeprefix(vault.url))


def wrap(ask: Raw, key: str, value: bytes = b"dek") -> str:
    text = base64.urlsafe_b64encode(value).decode().rstrip("=")
    return str(ask("POST", f"{key}/wrapkey", {"alg": OAEP, "value": text}).body["value"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "BadParameter"),
        (b"[]", "BadParameter"),
        (b"\xff\xfe\0", "BadParameter"),
        (b"[" * 50_000, "BadParameter"),
        ({}, "BadParameter"),
        ({"alg": OAEP}, "BadParameter"),
        ({"alg": OAEP, "value": "not base64!"}, "BadParameter"),
        ({"alg": OAEP, "value": "A"}, "BadParameter"),
        ({"alg": OAEP, "value": 5}, "BadParameter"),
        ({"alg": OAEP, "value": ""}, "BadParameter"),
        ({"alg": "RSA1_5", "value": "AAAA"}, "BadParameter"),
        ({"alg": "A256KW", "value": "AAAA"}, "BadParameter"),
        ({"alg": None, "value": "AAAA"}, "BadParameter"),
        ({"alg": "x" * 10_000, "value": "AAAA"}, "BadParameter"),
    ],
)
def test_a_bad_body_is_refused(ask: Raw, key: str, body: object, code: str) -> None:
    answer = ask("POST", f"{key}/unwrapkey", body)
    assert (answer.status, answer.code) == (400, code)
    assert len(answer.body["error"]["message"]) < 200


def test_a_foreign_or_damaged_wrapped_key_is_refused(ask: Raw, key: str) -> None:
    kid = ask("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}).body["key"]["kid"]
    other = wrap(ask, kid[kid.index("/keys") :])
    good = wrap(ask, key)
    for value in (other, good[:-4], good + "AAAA", "A" * len(good), good[:10]):
        answer = ask("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": value})
        assert (answer.status, answer.code) == (400, "BadParameter")
    assert ask("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": good}).status == 200


@pytest.mark.parametrize(
    "size", [(64 << 10) + 1, 1 << 20, 10 << 20], ids=["one too many", "a megabyte", "ten megabytes"]
)
def test_a_long_body_is_refused_before_it_is_read(vault: LabVault, token: str, key: str, size: int) -> None:
    with Raw(vault, token) as raw:
        raw.connection.putrequest("POST", f"{key}/wrapkey?api-version=7.6")
        raw.connection.putheader("Authorization", f"Bearer {token}")
        raw.connection.putheader("Content-Length", str(size))
        raw.connection.endheaders()
        answer = raw.connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["code"] == "RequestBodyTooLarge"


def test_a_body_of_unknown_length_is_cut_off(vault: LabVault, token: str, key: str) -> None:
    with Raw(vault, token) as raw:
        raw.connection.putrequest("POST", f"{key}/wrapkey?api-version=7.6")
        raw.connection.putheader("Authorization", f"Bearer {token}")
        raw.connection.putheader("Transfer-Encoding", "chunked")
        raw.connection.endheaders()
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        for _ in range(3):
            raw.connection.send(chunk)
        answer = raw.connection.getresponse()
        assert answer.status == 413
        answer.read()


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("a%2Fb", 400),
        ("..%2f..%2fetc", 400),
        ("a%00b", 400),
        ("a_b", 400),
        ("%C3%A4", 400),
        ("%FF", 400),
        ("a%0Ab", 400),
        ("a" * 128, 400),
        ("a" * 10_000, 400),
        ("%2e%2e", 400),
        ("'%20OR%201=1--", 400),
        ("%F0%9F%94%91", 400),
    ],
)
def test_a_bad_key_name_is_refused(ask: Raw, name: str, status: int) -> None:
    for method, path, body in (
        ("POST", f"/keys/{name}/create", {"kty": "RSA"}),
        ("GET", f"/keys/{name}/", None),
        ("DELETE", f"/keys/{name}", None),
        ("POST", f"/deletedkeys/{name}/recover", None),
        ("POST", f"/keys/{name}//unwrapkey", {"alg": OAEP, "value": "AAAA"}),
        ("PUT", f"/keys/{name}/rotationpolicy", {}),
    ):
        answer = ask(method, path, body)
        assert answer.status == status, (method, path[:80])
        assert answer.body["error"]["code"]


@pytest.mark.parametrize("version", ["nonsense", "0" * 32, "A" * 32, "0" * 33, "%00", "a%2Fb", "x" * 5000])
def test_a_bad_key_version_is_refused(ask: Raw, key: str, version: str) -> None:
    base = key.rsplit("/", 1)[0]
    answer = ask("POST", f"{base}/{version}/unwrapkey", {"alg": OAEP, "value": "AAAA"})
    assert answer.status in (400, 404)
    assert answer.body["error"]["code"]


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/keys", "/keys/", "/secrets/a", "//", "/keys/a/b/c/d", "/.git/config"]
)
def test_an_unknown_path_is_not_found(ask: Raw, path: str) -> None:
    answer = ask("POST", path, {})
    assert answer.status in (404, 405)
    assert answer.body["error"]["code"] in ("NotFound", "MethodNotAllowed")


@pytest.mark.parametrize(
    "query", ["maxresults=0", "maxresults=26", "maxresults=x", "maxresults=-1", "maxresults=" + "9" * 99]
)
def test_a_bad_page_is_refused(ask: Raw, query: str) -> None:
    assert ask("GET", f"/keys?{query}").status == 400


def test_responses_tell_little_of_the_server(ask: Raw, key: str) -> None:
    answer = ask("GET", key, headers={"x-ms-client-request-id": "5a4b1b5e-8a2e-4f3e-9d52-6f3f0a6d1a11"})
    assert answer.headers["x-ms-client-request-id"] == "5a4b1b5e-8a2e-4f3e-9d52-6f3f0a6d1a11"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers
    assert ask("GET", "/healthz").body == {"status": "ok"}
    odd = ask("GET", key, headers={"x-ms-client-request-id": "a b" * 100, "x-virt-sse-disk": "'; --"})
    assert odd.status == 200
    assert "x-ms-client-request-id" not in odd.headers


OTHER_KEY = ec.generate_private_key(ec.SECP256R1())


def altered(token: str, **changes: Any) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False}) | changes
    return claims


FORGERIES: dict[str, Callable[[str], str | None]] = {
    "none": lambda _token: None,
    "unsigned": lambda token: jwt.encode(altered(token), None, "none"),
    "another key's": lambda token: jwt.encode(altered(token), OTHER_KEY, "ES256"),
    "HMAC": lambda token: jwt.encode(altered(token), "0" * 64, "HS256"),
    "its signature gone": lambda token: token.rsplit(".", 1)[0] + ".",
    "its claims changed": lambda token: ".".join(
        [
            token.split(".")[0],
            base64.urlsafe_b64encode(json.dumps(altered(token, oid="x")).encode()).decode().rstrip("="),
            token.split(".")[2],
        ]
    ),
    "deep": lambda _token: base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=") + ".e30.AAAA",
    "nonsense": lambda _token: "nonsense",
    "long": lambda _token: "a" * 30_000,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_tokens_are_refused(vault: LabVault, token: str, key: str, forgery: str) -> None:
    with Raw(vault, FORGERIES[forgery](token)) as raw:
        answer = raw("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": "AAAA"})
    assert (answer.status, answer.code) == (401, "Unauthorized")
    file = VaultCredential(vault.administrator_path).file
    assert answer.headers["www-authenticate"] == (
        f'Bearer authorization="{vault.url}/{file.tenant}", resource="{file.audience}"'
    )


@pytest.mark.slow
def test_another_vault_s_token_is_refused(vault: LabVault, key: str) -> None:
    with LabVault() as other:
        foreign = VaultCredential(other.administrator_path).token()
    with Raw(vault, foreign) as raw:
        assert raw("GET", key).status == 401


def test_the_challenge_comes_before_the_body_is_read(vault: LabVault, key: str) -> None:
    with Raw(vault, None) as raw:
        raw.connection.putrequest("POST", f"{key}/wrapkey?api-version=7.6")
        raw.connection.putheader("Content-Length", "1000")
        raw.connection.endheaders()
        assert raw.connection.getresponse().status == 401


def test_a_token_request_of_another_tenant_finds_nothing(vault: LabVault) -> None:
    with Raw(vault, None) as raw:
        answer = raw("POST", "/00000000-0000-0000-0000-000000000000/oauth2/v2.0/token", b"grant_type=x")
    assert answer.status == 404


@pytest.mark.parametrize(
    "form", [b"", b"\xff", b"grant_type", b"&&&&", b"a=b&" * 100, b"grant_type=client_credentials"]
)
def test_a_malformed_token_request_is_refused(vault: LabVault, form: bytes) -> None:
    tenant = VaultCredential(vault.administrator_path).file.tenant
    with Raw(vault, None) as raw:
        answer = raw(
            "POST",
            f"/{tenant}/oauth2/v2.0/token",
            form,
            {"Content-Type": "application/x-www-form-urlencoded"},
        )
        assert answer.status == 400
        assert answer.body["error"] in ("invalid_request", "unsupported_grant_type")
        assert raw("POST", f"/{tenant}/oauth2/v2.0/token", b"a" * 20_000).status == 413


def test_a_request_that_is_not_http_is_refused(vault: LabVault) -> None:
    host, port = vault.url.removeprefix("https://").split(":")
    context = ssl.create_default_context(cafile=vault.ca_path)
    for said in (
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"x" * 100_000,
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        plain = socket.create_connection((host, int(port)), 10)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            try:
                connection.sendall(said)
                answer = connection.recv(4096)
            except OSError:  # it has hung up already, before all was said
                answer = b""
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    with socket.create_connection((host, int(port)), 10) as plain:  # no TLS
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert not plain.recv(4096).startswith(b"HTTP")


@pytest.mark.slow
def test_two_hundred_clients_are_served_at_once(vault: LabVault, token: str, key: str) -> None:
    with Raw(vault, token) as raw:
        wrapped = wrap(raw, key)

    def client(_number: int) -> list[int]:
        with Raw(vault, token) as raw:
            body = {"alg": OAEP, "value": wrapped}
            return [raw("POST", f"{key}/unwrapkey", body).status for _ in range(3)]

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        statuses = [status for found in pool.map(client, range(200)) for status in found]
    assert set(statuses) == {200}
    assert len(statuses) == 600


@pytest.mark.slow
def test_requests_are_answered_while_keys_are_generated(vault: LabVault, token: str, key: str) -> None:
    def create(_number: int) -> int:
        with Raw(vault, token) as raw:
            return raw("POST", f"/keys/{new_name()}/create", {"kty": "RSA", "key_size": 4096}).status

    with concurrent.futures.ThreadPoolExecutor(4) as pool, Raw(vault, token) as raw:
        wrapped = wrap(raw, key)
        making = [pool.submit(create, number) for number in range(4)]
        slowest = 0.0
        while not all(each.done() for each in making):
            asked = time.monotonic()
            assert raw("POST", f"{key}/unwrapkey", {"alg": OAEP, "value": wrapped}).status == 200
            slowest = max(slowest, time.monotonic() - asked)
        assert [each.result() for each in making] == [200] * 4
    assert slowest < 1.5


@pytest.mark.parametrize("version", [None, "", "1.0", "7.99", "latest"])
def test_azures_operations_need_a_known_api_version(ask: Raw, version: str | None) -> None:
    path = "/keys" if version is None else f"/keys?api-version={version}"
    answer = ask("GET", path, api_version=None)
    assert (answer.status, answer.code) == (400, "BadParameter")
    assert "api-version" in answer.body["error"]["message"]
    assert ask("GET", "/status", api_version=None).status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("release_policy", {"contentType": "application/json", "data": "e30"}),
        ("public_exponent", 3),
        ("crv", "P-256"),
        ("attributes", {"exportable": True}),
    ],
)
def test_choices_that_the_vault_does_not_offer_are_refused(ask: Raw, field: str, value: object) -> None:
    name = new_name()
    answer = ask("POST", f"/keys/{name}/create", {"kty": "RSA", field: value})
    assert (answer.status, answer.code) == (400, "BadParameter")
    assert ask("GET", f"/keys/{name}").status == 404
