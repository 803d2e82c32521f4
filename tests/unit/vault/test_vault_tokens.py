"""Principals, tokens and assertions: who is let in."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from rich.pretty import pretty_repr

from support.vault_doubles import Clock, Records
from virt_sse.errors import CredentialError, VaultError
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.identity.tokens import OAuthError, bearer
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.vault import Vault, open_vault
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.permissions import Permission, Role

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"


@pytest.fixture
def vault(directory: VaultDirectory, records: Records) -> Any:
    """An opened vault, at the time that it is: PyJWT knows no other."""
    with open_vault(directory, records) as vault:
        yield vault


@pytest.fixture
def file(directory: VaultDirectory) -> CredentialFile:
    return CredentialFile.read(directory.administrator_path)


def form(file: CredentialFile, assertion: str) -> dict[str, str]:
    return {
        "grant_type": "client_credentials",
        "client_id": file.client_id,
        "client_assertion_type": ASSERTION,
        "client_assertion": assertion,
        "scope": f"{file.audience}/.default",
    }


def token(vault: Vault, file: CredentialFile) -> str:
    return str(vault.tokens.issue(form(file, file.assertion()))[1]["access_token"])


def signed(file: CredentialFile, algorithm: str = "ES256", key: Any = None, **changes: Any) -> str:
    """An assertion of the file's principal, with *changes* to its claims; ``None`` takes one out."""
    now = int(time.time())
    claims = {
        "aud": file.token_endpoint,
        "iss": file.client_id,
        "sub": file.client_id,
        "iat": now,
        "exp": now + 300,
        "jti": secrets.token_hex(16),
    } | changes
    if algorithm != "none":
        key = key or load_pem_private_key(file.private_key.encode(), None)
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)


def test_an_assertion_buys_a_token_of_its_principal(vault: Vault, file: CredentialFile) -> None:
    assert vault.tokens.principal_of(token(vault, file)).client_id == file.client_id


def test_an_assertion_is_accepted_once(vault: Vault, directory: VaultDirectory, file: CredentialFile) -> None:
    assertion = file.assertion()
    vault.tokens.issue(form(file, assertion))
    with pytest.raises(OAuthError) as refused:
        vault.tokens.issue(form(file, assertion))
    assert (refused.value.status, refused.value.error) == (401, "invalid_client")


def test_a_restart_forgets_no_assertion(
    directory: VaultDirectory, file: CredentialFile, records: Records
) -> None:
    assertion = file.assertion()
    with open_vault(directory, records) as vault:
        given = str(vault.tokens.issue(form(file, assertion))[1]["access_token"])
    with open_vault(directory, records) as vault:
        with pytest.raises(OAuthError):
            vault.tokens.issue(form(file, assertion))
        assert vault.tokens.principal_of(given).client_id == file.client_id


OTHER_KEY = ec.generate_private_key(ec.SECP256R1())
BAD_ASSERTIONS: dict[str, Callable[[CredentialFile], str]] = {
    "another key's": lambda file: signed(file, key=OTHER_KEY),
    "unsigned": lambda file: signed(file, algorithm="none"),
    "signed with the public key": lambda file: signed(file, algorithm="HS256", key="0" * 64),
    "for another endpoint": lambda file: signed(file, aud="https://elsewhere.test/token"),
    "of another issuer": lambda file: signed(file, iss="somebody"),
    "about another subject": lambda file: signed(file, sub="somebody"),
    "expired": lambda file: signed(file, exp=int(time.time()) - 120),
    "long-lived": lambda file: signed(file, exp=int(time.time()) + 900),
    "not yet valid": lambda file: signed(file, nbf=int(time.time()) + 300),
    "without an end": lambda file: signed(file, exp=None),
    "without an id": lambda file: signed(file, jti=None),
    "without an audience": lambda file: signed(file, aud=None),
    "with an endless id": lambda file: signed(file, jti="x" * 10_000),
    "with a number for an id": lambda file: signed(file, exp="soon"),
    "no JWT": lambda _file: "a.b.c",
    "empty": lambda _file: "",
    "not ASCII": lambda _file: "ä.ö.ü",
}


OTHER_CLOCKS = ("expired", "long-lived", "not yet valid")
"""Signed by the principal, and refused for their times alone; clients take that for no verdict."""


@pytest.mark.parametrize("bad", BAD_ASSERTIONS)
def test_a_bad_assertion_buys_nothing(vault: Vault, file: CredentialFile, bad: str) -> None:
    try:
        assertion = BAD_ASSERTIONS[bad](file)
    except TypeError:  # PyJWT does not even make it
        pytest.skip("cannot be made")
    with pytest.raises(OAuthError) as refused:
        vault.tokens.issue(form(file, assertion))
    assert refused.value.error == ("invalid_grant" if bad in OTHER_CLOCKS else "invalid_client")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"client_assertion_type": "password"}, "invalid_request"),
        ({"scope": "https://elsewhere.test/.default"}, "invalid_scope"),
        ({"client_id": "00000000-0000-0000-0000-000000000000"}, "invalid_client"),
        ({"client_id": ""}, "invalid_client"),
    ],
)
def test_a_malformed_token_request_is_refused(
    vault: Vault, file: CredentialFile, change: dict[str, str], error: str
) -> None:
    with pytest.raises(OAuthError) as refused:
        vault.tokens.issue(form(file, file.assertion()) | change)
    assert refused.value.error == error


def test_rsa_principals_sign_with_rsa_only(vault: Vault, file: CredentialFile) -> None:
    key = rsa.generate_private_key(65537, 2048)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    principal = vault.principals.create("rsa", public)
    names = {"iss": principal.client_id, "sub": principal.client_id}
    mine = form(file, "") | {"client_id": principal.client_id}
    for algorithm in ("RS256", "PS256"):
        vault.tokens.issue(mine | {"client_assertion": signed(file, algorithm, key, **names)})
    for algorithm, other in (("RS512", key), ("ES256", OTHER_KEY)):
        with pytest.raises(OAuthError):
            vault.tokens.issue(mine | {"client_assertion": signed(file, algorithm, other, **names)})


def altered(vault: Vault, file: CredentialFile, key: Any, algorithm: str = "ES256", **changes: Any) -> str:
    """A token like those that the vault issues, with *changes*, signed with *key*."""
    claims = jwt.decode(token(vault, file), options={"verify_signature": False}) | changes
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm)


BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "expired": {"exp": int(time.time()) - 1},
    "other audience": {"aud": "https://elsewhere.test"},
    "other issuer": {"iss": "https://elsewhere.test"},
    "other tenant": {"tid": "00000000-0000-0000-0000-000000000000"},
    "unknown principal": {"oid": "00000000-0000-0000-0000-000000000000"},
    "another client": {"appid": "00000000-0000-0000-0000-000000000000"},
    "not yet": {"nbf": int(time.time()) + 86_400},  # long after the end of the whole suite
    "endless": {"exp": None},
    "without a tenant": {"tid": None},
    "without an id": {"jti": None},
}


@pytest.mark.parametrize("bad", BAD_CLAIMS)
def test_a_token_with_any_wrong_claim_is_refused(vault: Vault, file: CredentialFile, bad: str) -> None:
    key = vault.tokens._key  # as if the vault itself had signed it
    assert vault.tokens.principal_of(altered(vault, file, key)).client_id == file.client_id
    with pytest.raises(Refusal) as refused:
        vault.tokens.principal_of(altered(vault, file, key, **BAD_CLAIMS[bad]))
    assert refused.value.status == 401


def test_forged_tokens_are_refused(vault: Vault, file: CredentialFile) -> None:
    good = token(vault, file)
    header, claims, signature = good.split(".")
    other_claims = altered(vault, file, OTHER_KEY).split(".")[1]
    forged = [
        altered(vault, file, OTHER_KEY),
        altered(vault, file, None, "none"),
        altered(vault, file, "0" * 64, "HS256"),
        f"{header}.{claims}.",
        f"{header}.{claims}.{signature[:-4]}AAAA",
        f"{header}.{other_claims[:-4]}.{signature}",
        good[:-1],
        "",
        "a.b.c",
        "." * 1000,
    ]
    for each in forged:
        with pytest.raises(Refusal) as refused:
            vault.tokens.principal_of(each)
        assert refused.value.status == 401


def test_tokens_of_a_disabled_or_expired_principal_are_refused(vault: Vault, file: CredentialFile) -> None:
    private, public = new_assertion_key()
    principal = vault.principals.create("web", public)
    mine = CredentialFile(
        **{name: getattr(file, name) for name in CredentialFile.__struct_fields__}
        | {"client_id": principal.client_id, "private_key": private}
    )
    given = token(vault, mine)
    for change in (
        lambda: vault.principals.change(principal, enabled=False, expires=None),
        lambda: vault.principals.change(principal, enabled=True, expires=1),
    ):
        assert vault.tokens.principal_of(given) is not None
        change()
        with pytest.raises(Refusal, match="disabled or has expired"):
            vault.tokens.principal_of(given)
        with pytest.raises(OAuthError):
            token(vault, mine)
        vault.principals.change(principal, enabled=True, expires=None)
    vault.principals.delete(principal)
    with pytest.raises(Refusal, match="not known"):
        vault.tokens.principal_of(given)
    with pytest.raises(OAuthError):
        token(vault, mine)


def test_the_last_administrator_cannot_be_removed(vault: Vault) -> None:
    first = vault.principals.get("administrator")
    for change in (
        lambda: vault.principals.delete(first),
        lambda: vault.principals.change(first, enabled=False, expires=None),
        lambda: vault.principals.change(first, enabled=True, expires=2_000_000_000),
    ):
        with pytest.raises(Refusal, match="last administrator"):
            change()
    second = vault.principals.create("second", new_assertion_key()[1], role=Role.ADMINISTRATOR)
    vault.principals.delete(first)
    assert [principal.name for principal in vault.principals.all()] == [second.name]


def test_principals_and_permissions_survive_a_restart(directory: VaultDirectory, records: Records) -> None:
    granted = [Permission.UNWRAP_KEY, Permission.GET]
    with open_vault(directory, records) as vault:
        made = vault.principals.create("web", new_assertion_key()[1], expires=2_000_000_000, created_by="x")
        made = vault.principals.grant(made, granted)
    with open_vault(directory, records) as vault:
        assert vault.principals.get("web") == made
        assert vault.principals.get(made.object_id).permissions == frozenset(granted)
        vault.principals.delete(made)
        again = vault.principals.create("web", new_assertion_key()[1])
        assert again.permissions == frozenset(), "a deleted principal's rights came back"


def test_a_new_principal_inherits_nothing_of_a_deleted_one(vault: Vault) -> None:
    deleted = vault.principals.create("web", new_assertion_key()[1], permissions=[Permission.GET])
    vault.principals.delete(deleted)
    for identifier in (deleted.client_id, deleted.object_id, deleted.client_id.replace("-", "").upper()):
        with pytest.raises(Refusal, match="must not be a UUID"):
            vault.principals.create(identifier, new_assertion_key()[1])
    again = vault.principals.create("web", new_assertion_key()[1])
    for change in (
        lambda: vault.principals.grant(deleted, [Permission.GET]),
        lambda: vault.principals.adjust(deleted, granted=[Permission.GET], revoked=[]),
        lambda: vault.principals.change(deleted, enabled=False),
        lambda: vault.principals.delete(deleted),
    ):
        with pytest.raises(Refusal) as refused:
            change()
        assert refused.value.status == 404
    assert vault.principals.get("web") == again
    assert again.permissions == frozenset()


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "ä", "a" * 129, "a\0"])
def test_an_invalid_principal_name_is_refused(vault: Vault, name: str) -> None:
    with pytest.raises(Refusal, match="name"):
        vault.principals.create(name, new_assertion_key()[1])


def test_weak_and_wrong_public_keys_are_refused(vault: Vault) -> None:
    keys = [
        rsa.generate_private_key(65537, 1024).public_key(),  # noqa: S505 -- to be refused
        ec.generate_private_key(ec.SECP384R1()).public_key(),
    ]
    wrong = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode() for key in keys]
    for each in [*wrong, "", "no PEM", new_assertion_key()[0], "\ud800"]:
        with pytest.raises(Refusal) as refused:
            vault.principals.create("web", each)
        assert refused.value.status == 400


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer  a.b-c_d", "a.b-c_d"),
        ("Basic abc", None),
        ("Bearer", None),
        ("Bearer a b", None),
    ],
)
def test_a_bearer_token_is_read_from_its_header_alone(header: str, token: str | None) -> None:
    assert bearer(header) == token


def test_a_token_lives_for_as_long_as_the_vault_says(directory: VaultDirectory, records: Records) -> None:
    for seconds in (0, 901):
        with (
            pytest.raises(VaultError, match="good for"),
            open_vault(directory, records, token_seconds=seconds),
        ):
            pass


def test_a_credential_file_keeps_its_secrets(directory: VaultDirectory, file: CredentialFile) -> None:
    credential = VaultCredential(directory.administrator_path)
    for secret in file.private_key.splitlines()[1:-1]:
        assert secret not in repr(file) + repr(credential) + pretty_repr(file)
    assert directory.administrator_path.stat().st_mode & 0o777 == 0o600
    directory.administrator_path.chmod(0o640)
    with pytest.raises(CredentialError, match="open to others"):
        CredentialFile.read(directory.administrator_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"format": "virt-sse-vault-credential-1"}', b"[" * 9999]
)
def test_a_file_that_is_no_credential_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "credential"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(CredentialError):
        CredentialFile.read(path)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"format": "virt-sse-vault-credential-2"}, "`$.format`"),
        ({"expires": "never"}, "`$.expires`"),
        ({"private_key": None}, "`$.private_key`"),
        ({"pin": "hunter2"}, "`pin`"),
        ({"vault_url": "https://[::1"}, "Invalid IPv6 URL"),
    ],
)
def test_a_damaged_credential_file_names_the_field_and_no_secret(
    directory: VaultDirectory, wrong: dict[str, object], field: str
) -> None:
    path = directory.administrator_path
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | wrong))
    with pytest.raises(CredentialError) as caught:
        CredentialFile.read(path)
    assert field.lower() in str(caught.value).lower()
    for secret in ("hunter2", *fields["private_key"].splitlines()):
        assert secret not in str(caught.value)


def test_a_credential_file_of_the_first_version_is_read(
    directory: VaultDirectory, file: CredentialFile
) -> None:
    fields = {name: getattr(file, name) for name in CredentialFile.__struct_fields__}
    document = {"format": "virt-sse-vault-credential-1"} | fields
    assert directory.administrator_path.read_text() == json.dumps(document, indent=2) + "\n"
    assert CredentialFile.read(directory.administrator_path) == file


def test_a_credential_file_s_assertions_go_to_its_own_vault_alone(file: CredentialFile) -> None:
    fields = {name: getattr(file, name) for name in CredentialFile.__struct_fields__}
    for changed in (
        {"token_endpoint": "https://elsewhere.test/tenant/oauth2/v2.0/token"},
        {"token_endpoint": file.token_endpoint.replace("https", "http")},
        {"vault_url": "https://localhost:1"},
        {"vault_url": "https://user@localhost:8443"},
    ):
        with pytest.raises((CredentialError, ValueError)):
            CredentialFile(**fields | changed)


@pytest.mark.parametrize(
    ("url", "covered"),
    [
        ("https://localhost:8443", True),
        ("https://LOCALHOST:8443/keys/a/b?c", True),
        ("https://localhost", False),
        ("http://localhost:8443", False),
        ("https://localhost:8443@elsewhere.test", False),
        ("https://elsewhere.test:8443", False),
        ("https://localhost.elsewhere.test:8443", False),
        ("https://localhost:8443.elsewhere.test", False),
        ("https://[::1", False),
        ("", False),
    ],
)
def test_a_credential_is_for_the_urls_of_its_vault(file: CredentialFile, url: str, covered: bool) -> None:
    assert file.covers(url) is covered


def test_expiry_of_principals_is_by_the_vaults_clock(
    directory: VaultDirectory, records: Records, clock: Clock
) -> None:
    with open_vault(directory, records, clock=clock) as vault:
        made = vault.principals.create("web", new_assertion_key()[1], expires=int(clock.now) + 60)
        assert made.created == int(clock.now)
        assert made.active(clock.now + 59)
        assert not made.active(clock.now + 60)
