"""The transit provider's options and key names, and answers that are no verdicts of a server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from support.strange_vaults import TOKEN, Answer, Listener, StrangeVault, document
from virt_sse.errors import (
    ConfigError,
    InvalidValueError,
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderError,
    KeyProviderUnavailableError,
    UnwrapError,
)
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyState, ProviderConfig, WrappedDek
from virt_sse_plugins.key_providers.vault_transit import VaultTransitKeyProvider

CONTEXT = DekContext(UUID(int=1), "service")
DEK = Dek(bytes(range(32)))
KEY = KeyId("vault-transit", "transit/keys/web", "1")
WRAPPED = WrappedDek(bytes(92), "A256GCMKW", KEY)
SECRET_ID = "as-secret-as-a-password"  # noqa: S105 -- valid nowhere
URL = {"urls": ["https://bao.example:8200"]}
APPROLE = {**URL, "role-id": "r", "secret-id-file": "/s"}

Open = Callable[..., VaultTransitKeyProvider]


def read(**members: object) -> Answer:
    return document(
        data={"type": "aes256-gcm96", "latest_version": 1, "min_decryption_version": 1, **members}
    )


def errors(status: int, *texts: str) -> Answer:
    return Answer(status, json.dumps({"errors": texts}).encode())


@pytest.fixture
def open_transit(strange_vault: StrangeVault, tmp_path: Path) -> Iterator[Open]:
    """Opens a provider for the strange vault, with short time limits."""
    secret_id = tmp_path / "secret-id"
    secret_id.write_text(SECRET_ID + "\n")
    secret_id.chmod(0o600)
    opened = []

    def open_one(**options: object) -> VaultTransitKeyProvider:
        table = {
            "urls": [strange_vault.url],
            "ca": str(strange_vault.ca_file()),
            "role-id": "role",
            "secret-id-file": str(secret_id),
            "connection-timeout": 0.3,
            "timeout": 0.8,
        }
        opened.append(VaultTransitKeyProvider.from_config(ProviderConfig(tmp_path, table | options)))
        return opened[-1]

    yield open_one
    for provider in opened:
        provider.close()


@pytest.fixture
def transit(open_transit: Open) -> VaultTransitKeyProvider:
    return open_transit()


def uses(provider: VaultTransitKeyProvider) -> list[Callable[[], object]]:
    return [
        lambda: provider.current_key(KEY.name),
        lambda: provider.wrap(DEK, KEY, context=CONTEXT),
        lambda: provider.unwrap(WRAPPED, context=CONTEXT),
        lambda: provider.rotate(KEY.name),
    ]


# --- Options and names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"'urls' is missing in \[key-providers.vault-transit\]"),
        ({**APPROLE, "token": "x"}, "unknown option 'token'"),
        ({**APPROLE, "urls": []}, "'urls' in .* must be a list"),
        ({**APPROLE, "urls": "https://bao.example"}, "'urls' in .* must be a list"),
        ({**APPROLE, "urls": ["http://bao.example"]}, "'http://bao.example' is not https://HOST"),
        ({**APPROLE, "urls": ["https://u:p@bao.example"]}, r"is not https://HOST\[:PORT\]"),
        ({**APPROLE, "urls": ["https://bao.example/v1"]}, r"is not https://HOST\[:PORT\]"),
        ({**APPROLE, "login": "token"}, "'login' in .* must be 'approle' or 'cert'"),
        ({**APPROLE, "namespace": "../x"}, "'namespace' in .* must be the path of a namespace"),
        ({**APPROLE, "login-mount": "a b"}, "'login-mount' in .* must be the path"),
        ({**APPROLE, "ca": "ca.pem"}, "'ca' in .* must be the absolute path"),
        ({**APPROLE, "timeout": 0}, "'timeout' in .* must be a number of seconds"),
        ({**APPROLE, "timeout": float("nan")}, "'timeout' in .* must be a number of seconds"),
        ({**URL, "role-id": "r"}, "'secret-id-file' is missing"),
        ({**URL, "login": "cert", "certificate": "/c"}, "'private-key' is missing"),
        ({**APPROLE, "certificate": "/c"}, "'certificate' in .* is not allowed with the login 'approle'"),
        (
            {**APPROLE, "login": "cert", "certificate": "/c", "private-key": "/k"},
            "'role-id' in .* is not allowed with the login 'cert'",
        ),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VaultTransitKeyProvider.from_config(ProviderConfig(tmp_path, options))


def test_making_the_provider_reads_nothing(tmp_path: Path) -> None:
    VaultTransitKeyProvider.from_config(ProviderConfig(tmp_path, {**APPROLE, "ca": "/no/such"})).close()


def test_a_key_is_named_by_its_path() -> None:
    parse = VaultTransitKeyProvider.parse_key
    assert parse("transit/keys/web") == ("transit/keys/web", None)
    assert parse("transit/keys/web/12") == ("transit/keys/web", "12")
    assert parse("team/crypto/transit/keys/a.b-c_d") == ("team/crypto/transit/keys/a.b-c_d", None)
    assert parse("transit/keys/keys/1") == ("transit/keys/keys", "1")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web",
        "transit/web",
        "keys/web",
        "/transit/keys/web",
        "transit/keys/web/",
        "transit/keys/web/0",
        "transit/keys/web/x",
        "transit/keys/../web",
        "../sys/keys/web",
        "transit/keys/web?list=true",
        "transit/keys/w%65b",
        "transit/keys/" + "w" * 300,
        "https://bao.example:8200/v1/transit/keys/web",
    ],
)
def test_a_text_that_is_no_path_of_a_key_is_refused(transit: VaultTransitKeyProvider, text: str) -> None:
    with pytest.raises(InvalidValueError):
        transit.parse_key(text)
    with pytest.raises(KeyNotFoundError):
        transit.current_key(text)


# --- Answers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(200, b"<html>"), "does not answer like a Vault"),
        (Answer(200, b"[1]"), "does not answer like a Vault"),
        (Answer(200, b'{"data": 1}'), "does not answer like a Vault"),
        (Answer(403, b"<html>forbidden by the proxy"), r"does not answer like a Vault .*\(403\)"),
        (Answer(404, b'{"error": "no such site"}'), r"does not answer like a Vault .*\(404\)"),
        (Answer(400, b""), r"does not answer like a Vault .*\(400\)"),
        (errors(412, "required index state not present"), r"cannot answer now \(412\)"),
        (errors(429, "request path: rate limit quota exceeded"), r"cannot answer now \(429 rate limit\)"),
        (errors(500, "internal error"), r"cannot answer now \(500\)"),
        (errors(503, "Vault is sealed"), r"cannot answer now \(503 sealed\)"),
        (Answer(502, b"<html>"), r"cannot answer now \(502\)"),
        (document(data={}), "the key vault's answer is invalid"),
        (document(data={"type": "aes256-gcm96", "latest_version": "1"}), "the key vault's answer is invalid"),
        (document(data={"ciphertext": "vault:v1:AAAA", "plaintext": "AA"}), "answer is invalid|not belong"),
    ],
)
def test_an_answer_unlike_a_servers_is_no_verdict(
    strange_vault: StrangeVault, transit: VaultTransitKeyProvider, answer: Answer, message: str
) -> None:
    strange_vault.answers = [answer]
    for use in uses(transit):
        with pytest.raises((KeyProviderUnavailableError, UnwrapError), match=message):
            use()
    assert transit.key_state(KEY) is KeyState.UNREACHABLE


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirect_is_not_followed(
    strange_vault: StrangeVault, transit: VaultTransitKeyProvider, listener: Listener, status: int
) -> None:
    strange_vault.answers = [Answer(status, b"", {"Location": f"{listener.url}/v1/transit/keys/web"})]
    for use in uses(transit):
        with pytest.raises(KeyProviderUnavailableError, match=rf"\({status}\)"):
            use()
    assert listener.connections == []


@pytest.mark.parametrize(
    ("members", "error", "state"),
    [
        ({"latest_version": 2, "min_decryption_version": 2}, KeyDisabledError, KeyState.DISABLED),
        ({"latest_version": 2, "min_encryption_version": 2}, KeyDisabledError, KeyState.ENABLED),
        ({"latest_version": 2, "min_available_version": 2}, KeyNotFoundError, KeyState.DELETED),
        ({"latest_version": 0}, KeyNotFoundError, KeyState.DELETED),
        ({"soft_deleted": True}, KeyNotFoundError, KeyState.DELETED),
        ({"type": "rsa-2048"}, KeyOperationUnsupportedError, KeyState.ENABLED),
        ({"type": "aes128-gcm96"}, KeyOperationUnsupportedError, KeyState.ENABLED),
    ],
)
def test_nothing_is_encrypted_with_an_unsuitable_version(
    strange_vault: StrangeVault,
    transit: VaultTransitKeyProvider,
    members: dict[str, object],
    error: type[KeyProviderError],
    state: KeyState,
) -> None:
    strange_vault.answers = [read(**members)]
    with pytest.raises(error):
        transit.wrap(DEK, KEY, context=CONTEXT)
    assert transit.key_state(KEY) is state
    assert {seen.path for seen in strange_vault.seen} == {"/v1/transit/keys/web"}


@pytest.mark.parametrize("ciphertext", ["", "vault:v2:" + "A" * 124, "vault:v1:AAAA", "plain", 1])
def test_a_ciphertext_that_would_not_unwrap_is_refused(
    strange_vault: StrangeVault, transit: VaultTransitKeyProvider, ciphertext: object
) -> None:
    strange_vault.answers = [read(), document(data={"ciphertext": ciphertext})]
    with pytest.raises(KeyProviderUnavailableError, match="answer is invalid"):
        transit.wrap(DEK, KEY, context=CONTEXT)


def test_a_refused_token_is_looked_up_before_a_new_login(
    strange_vault: StrangeVault, transit: VaultTransitKeyProvider
) -> None:
    """A missing permission must not make a new token every time."""
    strange_vault.answers = [errors(403, "permission denied")]
    with pytest.raises(KeyDeniedError, match=r"refused the unwrap \(403 permission denied\)"):
        transit.unwrap(WRAPPED, context=CONTEXT)
    assert strange_vault.tokens == 2  # a login and a lookup
    assert [seen.headers["X-Vault-Token"] for seen in strange_vault.seen] == [TOKEN]


def test_no_error_shows_words_or_secrets_of_requests(
    strange_vault: StrangeVault, transit: VaultTransitKeyProvider
) -> None:
    for status in (400, 403, 404, 500):
        strange_vault.answers = [errors(status, f"{TOKEN} {SECRET_ID} {list(DEK.material)}")]
        for use in uses(transit):
            with pytest.raises(KeyProviderError) as caught:
                use()
            text = f"{caught.value} {caught.value.hint} {caught.value.__cause__!r}"
            assert TOKEN not in text
            assert SECRET_ID not in text
            assert "31" not in text


# --- Nobody answers


def test_a_login_that_cannot_be_tried_is_no_verdict(
    strange_vault: StrangeVault, open_transit: Open, tmp_path: Path
) -> None:
    strange_vault.answers = [read()]
    secret_id = tmp_path / "secret-id"
    provider = open_transit()
    for damage, message in (
        (lambda: secret_id.chmod(0o640), "secret-id is open to others"),
        (lambda: secret_id.write_text(""), "has no secret_id"),
        (secret_id.unlink, "No such file or directory"),
    ):
        damage()
        with pytest.raises(KeyProviderUnavailableError, match=message):
            provider.current_key(KEY.name)
        assert provider.key_state(KEY) is KeyState.UNREACHABLE
        secret_id.touch()
        secret_id.chmod(0o600)
    assert strange_vault.tokens == 0
    secret_id.write_text(SECRET_ID)  # mended, it is taken up without a restart
    assert provider.key_state(KEY) is KeyState.ENABLED


def test_a_login_answered_unlike_a_server_is_no_verdict(
    strange_vault: StrangeVault, open_transit: Open
) -> None:
    for answer in (
        Answer(403, b"<html>"),
        errors(503, "Vault is sealed"),
        document(auth={"client_token": "a\r\nb", "lease_duration": 1}),
        document(auth={"client_token": "", "mfa_requirement": {}}),
        document(auth={"client_token": "t", "lease_duration": -1}),
    ):
        strange_vault.token_answer = answer
        with pytest.raises(KeyProviderUnavailableError):
            open_transit().current_key(KEY.name)
    assert strange_vault.seen == []


def test_one_byte_at_a_time_ends_at_the_deadline(strange_vault: StrangeVault, open_transit: Open) -> None:
    strange_vault.answers = [read()]
    strange_vault.pause = 0.2
    began = time.monotonic()
    with pytest.raises(KeyProviderUnavailableError, match="timed out"):
        open_transit().current_key(KEY.name)
    assert time.monotonic() - began < 2


def test_a_server_that_hangs_is_left_for_the_next_address(
    strange_vault: StrangeVault, open_transit: Open, listener: Listener
) -> None:
    strange_vault.answers = [read()]
    provider = open_transit(urls=[listener.url, strange_vault.url])
    for _ in range(3):
        assert provider.key_state(KEY) is KeyState.ENABLED
    assert len(listener.connections) == 1


def test_a_certificate_of_another_authority_is_refused(
    strange_vault: StrangeVault, open_transit: Open
) -> None:
    for authority in ({"ca": "/etc/ssl/certs/ca-certificates.crt"}, {"ca": "/no/such"}):
        provider = open_transit(**authority)
        with pytest.raises(KeyProviderUnavailableError, match=r"is not trusted|cannot read certificates"):
            provider.current_key(KEY.name)
    assert (strange_vault.seen, strange_vault.tokens) == ([], 0)


def test_no_proxy_of_the_environment_is_used(
    strange_vault: StrangeVault, open_transit: Open, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange_vault.answers = [read()]
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, listener.url)
    for name in ("VAULT_ADDR", "BAO_ADDR", "VAULT_TOKEN", "BAO_TOKEN", "VAULT_NAMESPACE"):
        monkeypatch.setenv(name, "foreign")
    assert open_transit().current_key(KEY.name) == KEY
    assert listener.connections == []
    assert "X-Vault-Namespace" not in strange_vault.seen[0].headers
