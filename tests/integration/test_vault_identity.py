"""Who may do what in a running vault, how fast that changes, and what is recorded of it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

from support.vault_tools import OAEP, Raw, key_client, new_name
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord
from virt_sse.errors import (
    CredentialError,
    InvalidValueError,
    KeyDeniedError,
    KeyNotFoundError,
    PrincipalExistsError,
    PrincipalNotFoundError,
)
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.permissions import USE, Permission, Role

DEK = base64.urlsafe_b64encode(bytes(64)).decode().rstrip("=")


@pytest.fixture(scope="module")
def administrator(lab_vault: LabVault) -> Iterator[VaultClient]:
    with VaultClient(lab_vault.administrator_path) as client:
        client.grant("administrator", USE)
        yield client


@pytest.fixture
def key(lab_vault: LabVault, administrator: VaultClient) -> str:
    """The path of a version."""
    with Raw(lab_vault, VaultCredential(lab_vault.administrator_path).token()) as raw:
        kid = raw("POST", f"/keys/{new_name()}/create", {"kty": "RSA"}).body["key"]["kid"]
    return str(kid).removeprefix(lab_vault.url)


@pytest.fixture
def web(administrator: VaultClient, tmp_path: Path) -> CredentialFile:
    """A principal that may do nothing."""
    return administrator.new_credential_file(tmp_path / "web.json", new_name("web"))


REQUESTS: dict[Permission, tuple[str, str, object]] = {
    Permission.GET: ("GET", "{key}", None),
    Permission.LIST: ("GET", "/keys", None),
    Permission.CREATE: ("POST", "/keys/{new}/create", {"kty": "RSA"}),
    Permission.IMPORT: ("PUT", "/keys/{new}", {}),
    Permission.UPDATE: ("PATCH", "{key}", {}),
    Permission.ROTATE: ("POST", "{name}/rotate", {}),
    Permission.GET_ROTATION_POLICY: ("GET", "{name}/rotationpolicy", None),
    Permission.SET_ROTATION_POLICY: ("PUT", "{name}/rotationpolicy", {}),
    Permission.WRAP_KEY: ("POST", "{key}/wrapkey", {"alg": OAEP, "value": DEK}),
    Permission.UNWRAP_KEY: ("POST", "{key}/unwrapkey", {"alg": OAEP, "value": DEK}),
    Permission.ENCRYPT: ("POST", "{key}/encrypt", {"alg": OAEP, "value": DEK}),
    Permission.DECRYPT: ("POST", "{key}/decrypt", {"alg": OAEP, "value": DEK}),
    Permission.BACKUP: ("POST", "{name}/backup", None),
    Permission.RESTORE: ("POST", "/keys/restore", {"value": "AAAA"}),
    Permission.DELETE: ("DELETE", "{name}", None),
    Permission.RECOVER: ("POST", "/deletedkeys/{new}/recover", None),
    Permission.PURGE: ("DELETE", "/deletedkeys/{new}", None),
}


@pytest.mark.parametrize("permission", Permission, ids=lambda permission: permission.value)
def test_each_permission_opens_its_own_operation_and_no_other(
    lab_vault: LabVault, administrator: VaultClient, web: CredentialFile, key: str, permission: Permission
) -> None:
    administrator.set_permissions(web.client_id, [permission])
    with Raw(lab_vault, VaultCredential(web).token()) as raw:
        for other in [each for each in Permission if each is not permission] + [permission]:
            method, path, body = REQUESTS[other]
            path = path.format(key=key, name=key.rsplit("/", 1)[0], new=new_name())
            answer = raw(method, path, body)
            if other is permission:
                assert answer.status in (200, 400, 404)  # what the operation itself has to say
            else:
                assert (answer.status, answer.code) == (403, "ForbiddenByPolicy")


def test_nothing_is_allowed_by_default(lab_vault: LabVault, web: CredentialFile, key: str) -> None:
    with VaultCredential(web) as credential, key_client(credential) as client:
        with pytest.raises(HttpResponseError) as refused:
            client.get_key(key.split("/")[2])
        assert refused.value.status_code == 403
    with VaultClient(web) as client:
        for forbidden in (
            client.principals,
            client.access,
            lambda: client.grant(web.client_id, USE),
            lambda: client.create_principal(new_name(), new_assertion_key()[1]),
            lambda: client.delete_principal(web.client_id),
            lambda: client.delete_principal("administrator"),
        ):
            with pytest.raises(KeyDeniedError):
                forbidden()


REVOCATIONS: dict[str, Callable[[VaultClient, str], object]] = {
    "removed policy": lambda client, principal: client.revoke(principal),
    "removed permission": lambda client, principal: client.revoke(principal, [Permission.UNWRAP_KEY]),
    "disabled identity": lambda client, principal: client.change_principal(
        principal, enabled=False, expires=None
    ),
    "expired identity": lambda client, principal: client.change_principal(principal, enabled=True, expires=1),
    "deleted identity": lambda client, principal: client.delete_principal(principal),
}


@pytest.mark.parametrize("revocation", REVOCATIONS)
def test_a_revocation_holds_from_the_next_request_on(
    lab_vault: LabVault, administrator: VaultClient, web: CredentialFile, key: str, revocation: str
) -> None:
    administrator.grant(web.client_id, [Permission.WRAP_KEY, Permission.UNWRAP_KEY])
    with Raw(lab_vault, VaultCredential(web).token()) as raw:
        wrapped = raw("POST", f"{key}/wrapkey", {"alg": OAEP, "value": DEK}).body["value"]
        body = {"alg": OAEP, "value": wrapped}
        assert raw("POST", f"{key}/unwrapkey", body).status == 200
        REVOCATIONS[revocation](administrator, web.client_id)
        expected = 403 if revocation.startswith("removed") else 401
        assert raw("POST", f"{key}/unwrapkey", body).status == expected
    if expected == 401:
        with (
            VaultCredential(web) as credential,
            key_client(credential) as client,
            pytest.raises(KeyDeniedError),
        ):
            client.get_key("any")


def test_the_sdk_says_that_a_token_is_refused(
    lab_vault: LabVault, administrator: VaultClient, web: CredentialFile
) -> None:
    administrator.grant(web.client_id, [Permission.LIST])
    with VaultCredential(web) as credential, key_client(credential) as client:
        assert isinstance(list(client.list_properties_of_keys()), list)
        administrator.delete_principal(web.client_id)
        with pytest.raises(ClientAuthenticationError) as refused:
            list(client.list_properties_of_keys())
        assert refused.value.status_code == 401


@pytest.mark.slow
def test_an_expired_token_is_refused_and_replaced() -> None:
    # Their times are in whole seconds: one is good for two to three.
    with LabVault(arguments=("--token-seconds", "3")) as vault:
        credential = VaultCredential(vault.administrator_path)
        first = credential.token()
        with Raw(vault, first) as raw:
            assert raw("GET", "/keys").status == 200
            time.sleep(3)
            answer = raw("GET", "/keys")
            assert (answer.status, answer.body["error"]["message"]) == (401, "The token has expired.")
        assert credential.token() != first
        with key_client(credential) as client:
            assert list(client.list_properties_of_keys()) == []
            time.sleep(3)
            assert list(client.list_properties_of_keys()) == []


def test_a_token_is_kept_and_given_for_its_own_vault_alone(web: CredentialFile) -> None:
    with VaultCredential(web) as credential:
        scope = f"{web.audience}/.default"
        first = credential.get_token(scope, tenant_id=web.tenant, claims=None)
        assert credential.get_token(scope) == first
        assert 0 < first.expires_on - time.time() <= 900
        for scopes in (
            (),
            ("https://vault.azure.net/.default",),
            (scope, scope),
            ("https://elsewhere.test/.default",),
        ):
            with pytest.raises(KeyDeniedError, match="alone"):
                credential.get_token(*scopes)
        with pytest.raises(KeyDeniedError, match="tenant"):
            credential.get_token(scope, tenant_id="another")
        credential.forget()
        assert credential.get_token(scope).token != first.token
        assert first.token not in repr(credential)


def test_an_identity_operator_has_its_own_identities_and_grants_nothing(
    lab_vault: LabVault, administrator: VaultClient, tmp_path: Path
) -> None:
    name = new_name("host")
    file = administrator.new_credential_file(tmp_path / "host.json", name, role=Role.IDENTITY_OPERATOR)
    other = administrator.create_principal(new_name("other"), new_assertion_key()[1])
    with VaultClient(file) as operator:
        made = operator.create_principal(new_name("des"), new_assertion_key()[1], expires=2_000_000_000)
        assert made.created_by == file.client_id
        assert operator.principals() == [made] == [operator.get_principal(made.object_id)]
        assert administrator.permissions(made.client_id) == frozenset()
        for forbidden in (
            lambda: operator.grant(made.client_id, [Permission.GET]),
            lambda: operator.permissions(made.client_id),
            lambda: operator.revoke(made.client_id),
            operator.access,
            lambda: operator.change_principal(made.client_id, enabled=True, expires=None),
            lambda: operator.create_principal(
                new_name(), new_assertion_key()[1], role=Role.IDENTITY_OPERATOR
            ),
            lambda: operator.create_principal(new_name(), new_assertion_key()[1], role=Role.ADMINISTRATOR),
        ):
            with pytest.raises(KeyDeniedError):
                forbidden()
        for hidden in (other.client_id, "administrator", name):
            with pytest.raises(PrincipalNotFoundError):
                operator.get_principal(hidden)
            with pytest.raises(PrincipalNotFoundError):
                operator.delete_principal(hidden)
        operator.delete_principal(made.name)
        assert operator.principals() == []
    assert administrator.get_principal(other.name) == other


def test_principals_are_created_changed_and_deleted(administrator: VaultClient, tmp_path: Path) -> None:
    name = new_name("web")
    made = administrator.create_principal(name, new_assertion_key()[1])
    assert administrator.get_principal(made.client_id) == made == administrator.get_principal(name)
    assert made in administrator.principals()
    with pytest.raises(PrincipalExistsError):
        administrator.create_principal(name, new_assertion_key()[1])
    with pytest.raises(InvalidValueError):
        administrator.create_principal(new_name(), "no key")
    with pytest.raises(InvalidValueError):
        administrator.create_principal("no/name", new_assertion_key()[1])
    for moment in (-1, 10**30):
        with pytest.raises(InvalidValueError, match="expires"):
            administrator.create_principal(new_name(), new_assertion_key()[1], expires=moment)
        with pytest.raises(InvalidValueError, match="expires"):
            administrator.change_principal(name, enabled=True, expires=moment)
    assert administrator.grant(name, [Permission.GET]) == {Permission.GET}
    assert administrator.grant(name, USE) == USE | {Permission.GET}
    assert administrator.revoke(name, [Permission.GET]) == USE
    assert administrator.permissions(made.object_id) == USE
    assert [policy.permissions for policy in administrator.access() if policy.name == name] == [USE]
    administrator.delete_principal(name)
    assert name not in {policy.name for policy in administrator.access()}
    for gone in (administrator.get_principal, administrator.delete_principal, administrator.permissions):
        with pytest.raises(PrincipalNotFoundError):
            gone(name)
    with pytest.raises(KeyDeniedError, match="LastAdministrator"):
        administrator.delete_principal("administrator")


def test_a_credential_file_that_cannot_be_written_leaves_no_principal(
    administrator: VaultClient, tmp_path: Path
) -> None:
    name = new_name("web")
    with pytest.raises(CredentialError):
        administrator.new_credential_file(tmp_path / "none/web.json", name)
    (tmp_path / "taken").touch()
    with pytest.raises(CredentialError, match="exists already"):
        administrator.new_credential_file(tmp_path / "taken", name)
    with pytest.raises(PrincipalNotFoundError):
        administrator.get_principal(name)


@pytest.mark.slow
def test_purge_protection_keeps_deleted_keys() -> None:
    with (
        LabVault(purge_protection=True, retention_days=7) as vault,
        VaultCredential(vault.administrator_path) as credential,
        key_client(credential) as client,
    ):
        key = client.create_rsa_key("kek")
        assert key.properties.recovery_level == "CustomizedRecoverable"
        client.begin_delete_key("kek").wait()
        with pytest.raises(HttpResponseError) as refused:
            client.purge_deleted_key("kek")
        assert refused.value.status_code == 403
        assert client.begin_recover_deleted_key("kek").result().id == key.id


def records_of(vault: LabVault, correlation: UUID) -> list[AuditRecord]:
    log = AuditLog(vault.directory / "audit.jsonl")
    return [entry.record for entry in log.records(correlation=correlation)]


def test_every_use_of_a_key_is_recorded_allowed_or_refused(
    lab_vault: LabVault, administrator: VaultClient, web: CredentialFile, key: str
) -> None:
    disk = uuid4()
    url, version = f"{lab_vault.url}{key.rsplit('/', 1)[0]}", key.rsplit("/", 1)[1]
    actor = f"{administrator.get_principal(web.client_id).name} ({web.client_id})"
    administrator.grant(web.client_id, [Permission.WRAP_KEY, Permission.GET])
    with Raw(lab_vault, VaultCredential(web).token()) as raw, Raw(lab_vault, "forged") as stranger:

        def asks(who: Raw, operation: str, body: object, path: str = key) -> AuditRecord:
            correlation = uuid4()
            headers = {"x-ms-client-request-id": str(correlation), "x-virt-sse-disk": str(disk)}
            who("POST", f"{path}/{operation}", body, headers)
            (record,) = records_of(lab_vault, correlation)
            assert (record.disk, record.source, record.key) == (disk, "127.0.0.1", url)
            return record

        good = {"alg": OAEP, "value": DEK}
        found = [
            asks(raw, "wrapkey", good),
            asks(raw, "wrapkey", good, key.rsplit("/", 1)[0] + "/"),
            asks(raw, "wrapkey", b"{"),
            asks(raw, "wrapkey", b" " * 70_000),
            asks(raw, "unwrapkey", good),
            asks(stranger, "unwrapkey", good),
        ]
        assert [(r.actor, r.action, r.key_version, r.result.value, r.reason) for r in found] == [
            (actor, "wrap", version, "allowed", None),
            (actor, "wrap", version, "allowed", None),
            (actor, "wrap", version, "refused", "BadParameter"),
            (actor, "wrap", version, "refused", "RequestBodyTooLarge"),
            (actor, "unwrap", version, "refused", "ForbiddenByPolicy"),
            ("unknown", "unwrap", version, "refused", "Unauthorized"),
        ]
        watch = uuid4()
        assert raw("GET", key, headers={"x-ms-client-request-id": str(watch)}).status == 200
        assert records_of(lab_vault, watch) == [], "watching a key fills the log"
    assert DEK not in (lab_vault.directory / "audit.jsonl").read_text()
    assert AuditLog(lab_vault.directory / "audit.jsonl").verify().broken is None


def test_strangers_cannot_fill_the_log(lab_vault: LabVault, key: str) -> None:
    path = lab_vault.directory / "audit.jsonl"
    before = path.stat().st_size
    with Raw(lab_vault, "forged") as stranger:
        for _ in range(200):
            assert stranger("GET", key).status == 401
    assert path.stat().st_size - before < 100 * 800


def test_permissions_on_a_single_key(lab_vault: LabVault, administrator: VaultClient, tmp_path: Path) -> None:
    name = new_name("web")
    administrator.new_credential_file(tmp_path / "web.json", name)
    with (
        VaultCredential(tmp_path / "web.json") as credential,
        VaultCredential(lab_vault.administrator_path) as all_rights,
        key_client(all_rights) as client,
        Raw(lab_vault, credential.token()) as raw,
    ):
        ours, other = (client.create_rsa_key(new_name("Key"), size=2048) for _ in range(2))

        def status(kid: str | None, operation: str = "wrapkey") -> int:
            path = str(kid).removeprefix(lab_vault.url)
            return raw("POST", f"{path}/{operation}", {"alg": OAEP, "value": "AAAA"}).status

        with pytest.raises(KeyNotFoundError):
            administrator.set_permissions(name, USE, key=new_name())
        assert administrator.set_permissions(name, USE, key=str(ours.name).upper()) == USE
        assert administrator.permissions(name) == frozenset()
        assert (status(ours.id), status(other.id)) == (200, 403)
        assert administrator.revoke(name, [Permission.WRAP_KEY], key=ours.name) == USE - {Permission.WRAP_KEY}
        assert (status(ours.id), status(ours.id, "encrypt")) == (403, 200)
        administrator.revoke_all(name)
        assert status(ours.id, "encrypt") == 403
        # The permissions end with the key: a later key of that name is another key.
        administrator.set_permissions(name, USE, key=ours.name)
        client.begin_delete_key(str(ours.name)).wait()
        client.purge_deleted_key(str(ours.name))
        assert status(client.create_rsa_key(str(ours.name), size=2048).id) == 403
