"""The official SDK, synchronous and asynchronous, unmodified, against a running vault."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.core.rest import HttpRequest
from azure.identity import CertificateCredential, ClientAssertionCredential
from azure.keyvault.keys import (
    JsonWebKey,
    KeyClient,
    KeyOperation,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
    KeyRotationPolicyAction,
)
from azure.keyvault.keys import aio as keys_aio
from azure.keyvault.keys.crypto import CryptographyClient, EncryptionAlgorithm, KeyWrapAlgorithm
from azure.keyvault.keys.crypto import aio as crypto_aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from support.vault_tools import OAEP, key_client, new_name, sdk_options
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import AsyncVaultCredential, VaultCredential
from virt_sse.vault_client.permissions import USE, Permission

DEK = bytes(range(64))


@pytest.fixture(scope="module")
def credential(lab_vault: LabVault) -> Iterator[VaultCredential]:
    """An administrator who may use keys, too."""
    with VaultClient(lab_vault.administrator_path) as client:
        client.grant("administrator", USE)
    with VaultCredential(lab_vault.administrator_path) as credential:
        yield credential


@pytest.fixture(scope="module")
def client(credential: VaultCredential) -> Iterator[KeyClient]:
    with key_client(credential) as client:
        yield client


def cryptography(client: KeyClient, credential: VaultCredential, key_id: str) -> CryptographyClient:
    """One that knows no more than where the key is. It gets the public key, and then wraps by itself."""
    return CryptographyClient(key_id, credential, **sdk_options(credential))


def refusal(error: pytest.ExceptionInfo[HttpResponseError]) -> tuple[int | None, str | None]:
    """The status and the most exact code."""
    inner = error.value.error.innererror if error.value.error else None
    return error.value.status_code, inner["code"] if inner else error.value.error and error.value.error.code


@pytest.mark.parametrize("size", [2048, 3072, 4096])
def test_keys_of_every_size_wrap_and_unwrap(
    client: KeyClient, credential: VaultCredential, size: int
) -> None:
    key = client.create_rsa_key(new_name(), size=size)
    assert key.key.n is not None
    assert len(key.key.n) * 8 == size
    assert key.key.d is None
    remote = cryptography(client, credential, str(key.id))
    for algorithm in (KeyWrapAlgorithm.rsa_oaep_256, KeyWrapAlgorithm.rsa_oaep):
        wrapped = remote.wrap_key(algorithm, DEK)
        assert wrapped.key_id == key.id
        assert remote.unwrap_key(algorithm, wrapped.encrypted_key).key == DEK
    sealed = remote.encrypt(EncryptionAlgorithm.rsa_oaep_256, DEK)
    assert remote.decrypt(EncryptionAlgorithm.rsa_oaep_256, sealed.ciphertext).plaintext == DEK


def test_the_sdk_wraps_remotely_and_the_wrap_is_audited(client: KeyClient) -> None:
    key = client.create_rsa_key(new_name())
    path = f"/keys/{key.name}/{key.properties.version}"
    wrapped = client.send_request(
        HttpRequest("POST", f"{path}/wrapkey", json={"alg": OAEP, "value": "AAAA"})
    ).json()
    assert wrapped["kid"] == key.id
    answer = client.send_request(
        HttpRequest("POST", f"{path}/unwrapkey", json={"alg": OAEP, "value": wrapped["value"]})
    )
    assert answer.json() == {"kid": key.id, "value": "AAAA"}


def test_requests_that_azure_refuses_are_refused(client: KeyClient, credential: VaultCredential) -> None:
    name = new_name()
    for make in (
        lambda: client.create_ec_key(name),
        lambda: client.create_oct_key(name, size=256),
        lambda: client.create_rsa_key(name, size=1024),
        lambda: client.create_rsa_key("no_name"),
    ):
        with pytest.raises(HttpResponseError) as refused:
            make()
        assert refusal(refused) == (400, "BadParameter")
    for make in (
        lambda: client.create_rsa_key(name, hardware_protected=True),
        lambda: client.create_ec_key(name, hardware_protected=True),
    ):
        with pytest.raises(HttpResponseError, match="Hardware key operation not allowed") as refused:
            make()
        assert refusal(refused) == (403, "Forbidden")
    with pytest.raises(ResourceNotFoundError):
        client.get_key(name)
    key = client.create_rsa_key(name)
    remote = cryptography(client, credential, str(key.id))
    for use in (
        lambda: remote.unwrap_key(KeyWrapAlgorithm.rsa1_5, bytes(256)),
        lambda: remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, bytes(256)),
    ):
        with pytest.raises(HttpResponseError) as refused:
            use()
        assert refusal(refused) == (400, "BadParameter")


def test_a_key_is_disabled_and_enabled_again(client: KeyClient, credential: VaultCredential) -> None:
    key = client.create_rsa_key(new_name(), tags={"owner": "us"})
    remote = cryptography(client, credential, str(key.id))
    wrapped = remote.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK).encrypted_key
    disabled = client.update_key_properties(str(key.name), enabled=False)
    assert (disabled.properties.enabled, disabled.properties.tags) == (False, {"owner": "us"})
    fresh = cryptography(client, credential, str(key.id))
    # Not wrapping: the SDK itself refuses that with a key which it knows to be disabled.
    with pytest.raises(HttpResponseError) as refused:
        fresh.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped)
    assert refusal(refused) == (403, "KeyDisabled")
    client.update_key_properties(str(key.name), str(key.properties.version), enabled=True)
    assert fresh.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == DEK


def test_a_new_key_keeps_its_attributes(client: KeyClient) -> None:
    start = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    end = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    key = client.create_rsa_key(
        new_name(),
        not_before=start,
        expires_on=end,
        enabled=False,
        key_operations=[KeyOperation.unwrap_key],
        tags={"a": "b"},
    )
    found = client.get_key(str(key.name))
    assert found.properties.not_before == start
    assert found.properties.expires_on == end
    assert found.key_operations == ["unwrapKey"]
    assert found.properties.enabled is False
    assert found.properties.recovery_level == "Recoverable+Purgeable"
    assert found.properties.recoverable_days == 90
    later = end.replace(year=2032)
    changed = client.update_key_properties(str(key.name), expires_on=later, tags={})
    assert (changed.properties.expires_on, changed.properties.tags) == (later, {})
    assert changed.properties.not_before == start


def test_an_imported_key_wraps_and_unwraps(client: KeyClient, credential: VaultCredential) -> None:
    private = rsa.generate_private_key(65537, 2048)
    numbers = private.private_numbers()

    def raw(number: int) -> bytes:
        return number.to_bytes((number.bit_length() + 7) // 8, "big")

    web_key = JsonWebKey(
        kty="RSA",
        key_ops=["wrapKey", "unwrapKey"],
        n=raw(numbers.public_numbers.n),
        e=raw(numbers.public_numbers.e),
        d=raw(numbers.d),
        p=raw(numbers.p),
        q=raw(numbers.q),
        dp=raw(numbers.dmp1),
        dq=raw(numbers.dmq1),
        qi=raw(numbers.iqmp),
    )
    key = client.import_key(new_name(), web_key)
    assert key.key.n == web_key.n
    assert key.key.d is None
    remote = cryptography(client, credential, str(key.id))
    wrapped = remote.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK)
    assert remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key).key == DEK
    with pytest.raises(HttpResponseError) as refused:
        client.import_key(new_name(), web_key, hardware_protected=True)
    assert refusal(refused) == (403, "Forbidden")
    with pytest.raises(HttpResponseError) as refused:
        client.import_key(new_name(), JsonWebKey(kty="RSA", n=web_key.n, e=web_key.e))
    assert refusal(refused) == (400, "BadParameter")


def test_rotation_makes_a_new_version_and_the_old_one_still_unwraps(
    client: KeyClient, credential: VaultCredential
) -> None:
    name = new_name()
    first = client.create_rsa_key(name)
    wrapped = cryptography(client, credential, str(first.id)).wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK)
    second = client.rotate_key(name)
    assert client.get_key(name).id == second.id != first.id
    assert client.get_key(name, first.properties.version).id == first.id
    versions = {each.version for each in client.list_properties_of_key_versions(name)}
    assert versions == {first.properties.version, second.properties.version}
    old = cryptography(client, credential, str(first.id))
    assert old.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key).key == DEK
    with pytest.raises(HttpResponseError):
        cryptography(client, credential, str(second.id)).unwrap_key(
            KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key
        )


def test_a_rotation_policy_sets_the_expiry_of_new_versions(client: KeyClient) -> None:
    name = new_name()
    client.create_rsa_key(name)
    (default,) = client.get_key_rotation_policy(name).lifetime_actions
    assert default.action == "Notify"
    action = KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_before_expiry="P30D")
    made = client.update_key_rotation_policy(
        name, KeyRotationPolicy(expires_in="P90D", lifetime_actions=[action])
    )
    assert made.expires_in == "P90D"
    found = client.get_key_rotation_policy(name)
    assert (found.expires_in, found.lifetime_actions[0].time_before_expiry) == ("P90D", "P30D")
    expires = client.rotate_key(name).properties.expires_on
    assert expires is not None
    assert (
        abs(expires - datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=90)).total_seconds() < 60
    )


def test_a_key_is_deleted_recovered_and_purged(client: KeyClient) -> None:
    name = new_name()
    key = client.create_rsa_key(name)
    deleted = client.begin_delete_key(name).result()
    assert deleted.id == key.id
    assert deleted.scheduled_purge_date is not None
    assert deleted.deleted_date is not None
    assert (deleted.scheduled_purge_date - deleted.deleted_date).days == 90
    with pytest.raises(ResourceNotFoundError):
        client.get_key(name)
    with pytest.raises(ResourceExistsError) as refused:
        client.create_rsa_key(name)
    assert refusal(refused) == (409, "ObjectIsDeletedButRecoverable")
    assert name in {each.name for each in client.list_deleted_keys()}
    assert client.begin_recover_deleted_key(name).result().id == key.id
    assert client.get_key(name).id == key.id
    client.begin_delete_key(name).wait()
    client.purge_deleted_key(name)
    with pytest.raises(ResourceNotFoundError):
        client.get_deleted_key(name)
    with pytest.raises(ResourceNotFoundError):
        client.begin_recover_deleted_key(name)


@pytest.mark.slow
def test_a_backup_restores_all_versions_of_a_key(client: KeyClient) -> None:
    name = new_name()
    key = client.create_rsa_key(name)
    for _ in range(30):  # their backup is longer than any other request may be
        client.rotate_key(name)
    blob = client.backup_key(name)
    client.begin_delete_key(name).wait()
    client.purge_deleted_key(name)
    client.restore_key_backup(blob)
    versions = [each.version for each in client.list_properties_of_key_versions(name)]
    assert len(versions) == 31
    assert versions[0] == key.properties.version
    with pytest.raises(ResourceExistsError):
        client.restore_key_backup(blob)
    with pytest.raises(HttpResponseError) as refused:
        client.restore_key_backup(blob[:-1])
    assert refusal(refused) == (400, "BadParameter")


def test_a_backup_too_large_to_be_restored_is_refused(client: KeyClient, lab_vault: LabVault) -> None:
    name = new_name()
    client.create_rsa_key(name)
    with contextlib.closing(sqlite3.connect(lab_vault.directory / "vault.sqlite")) as database, database:
        database.execute(
            """
            WITH RECURSIVE numbers(number) AS (SELECT 1 UNION SELECT number + 1 FROM numbers LIMIT 12000)
            INSERT INTO versions
                (version, name, key_type, n, e, operations, enabled, created, updated, tags, stored)
            SELECT printf('%032x', number),
                name, key_type, n, e, operations, enabled, created, updated, tags, stored
            FROM versions, numbers WHERE name = ?
            """,
            (name,),
        )
    with pytest.raises(ResourceExistsError, match="too many versions") as refused:
        client.backup_key(name)
    assert refused.value.status_code == 409
    client.begin_delete_key(name).wait()
    client.purge_deleted_key(name)


@pytest.mark.slow
def test_listings_go_on_over_pages(client: KeyClient) -> None:
    names = {new_name("page") for _ in range(30)}
    for name in names:
        client.create_rsa_key(name)
    pages = [list(page) for page in client.list_properties_of_keys().by_page()]
    assert max(len(page) for page in pages) == 25
    assert names <= {each.name for page in pages for each in page}
    listed = [each.name for page in pages for each in page]
    assert len(listed) == len(set(listed))
    small = client.list_properties_of_keys(max_page_size=7)
    assert {each.name for each in small} == set(listed)


def test_random_bytes_differ_and_are_limited(client: KeyClient) -> None:
    assert len(client.get_random_bytes(32)) == 32
    assert client.get_random_bytes(32) != client.get_random_bytes(32)
    with pytest.raises(HttpResponseError):
        client.get_random_bytes(129)


@asynccontextmanager
async def asynchronous(credential: VaultCredential) -> AsyncIterator[keys_aio.KeyClient]:
    async with (
        AsyncVaultCredential(credential) as own,
        keys_aio.KeyClient(credential.file.vault_url, own, **sdk_options(credential)) as client,
    ):
        yield client


def test_the_asynchronous_clients_work_as_the_synchronous_ones(credential: VaultCredential) -> None:
    async def life(client: keys_aio.KeyClient) -> None:
        name = new_name()
        key = await client.create_rsa_key(name, size=2048)
        remote = crypto_aio.CryptographyClient(
            str(key.id), AsyncVaultCredential(credential), **sdk_options(credential)
        )
        async with remote:
            wrapped = await remote.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK)
            unwrapped = await asyncio.gather(
                *(remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key) for _ in range(20))
            )
            assert {each.key for each in unwrapped} == {DEK}
            sealed = await remote.encrypt(EncryptionAlgorithm.rsa_oaep_256, DEK)
            assert (
                await remote.decrypt(EncryptionAlgorithm.rsa_oaep_256, sealed.ciphertext)
            ).plaintext == DEK
            await client.update_key_properties(name, enabled=False)
            with pytest.raises(HttpResponseError) as refused:
                await remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped.encrypted_key)
            assert refusal(refused) == (403, "KeyDisabled")
        await client.update_key_properties(name, enabled=True)
        rotated = await client.rotate_key(name)
        assert (await client.get_key(name)).id == rotated.id
        assert [each.version async for each in client.list_properties_of_key_versions(name)] == [
            *(key.properties.version, rotated.properties.version)
        ]
        blob = await client.backup_key(name)
        await client.delete_key(name)
        assert name in [each.name async for each in client.list_deleted_keys()]
        await client.recover_deleted_key(name)
        await client.delete_key(name)
        await client.purge_deleted_key(name)
        assert (await client.restore_key_backup(blob)).id == rotated.id
        assert name in [each.name async for each in client.list_properties_of_keys()]
        assert len(await client.get_random_bytes(8)) == 8

    async def main() -> None:
        async with asynchronous(credential) as client:
            await life(client)

    asyncio.run(main())


def test_credentials_of_azure_identity_get_tokens(lab_vault: LabVault, credential: VaultCredential) -> None:
    file = credential.file
    options = {
        "authority": lab_vault.url,
        "disable_instance_discovery": True,
        "connection_verify": str(lab_vault.ca_path),
    }
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    pem = certificate.public_bytes(Encoding.PEM)
    pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with VaultClient(lab_vault.administrator_path) as administrator:
        principal = administrator.create_principal(new_name("certificate"), public)
        administrator.grant(principal.client_id, [Permission.LIST])
    for own in (
        ClientAssertionCredential(file.tenant, file.client_id, file.assertion, **options),
        CertificateCredential(file.tenant, principal.client_id, certificate_data=pem, **options),
    ):
        with own, KeyClient(lab_vault.url, own, **sdk_options(credential)) as client:
            assert isinstance([each.name for each in client.list_properties_of_keys()], list)


def test_a_stock_client_checks_the_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK accepts a challenge only for a parent domain of the vault's name."""
    resolve = socket.getaddrinfo

    def resolved(host: str, *arguments: object, **options: object) -> object:
        return resolve("127.0.0.1" if host == "lab.vault.test" else host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    with (
        LabVault(audience="vault.test") as vault,
        VaultCredential(vault.administrator_path) as credential,
        KeyClient(
            credential.file.vault_url, credential, connection_verify=credential.ca_file(), retry_total=0
        ) as client,
    ):
        assert credential.file.vault_url.startswith("https://lab.vault.test:")
        assert client.create_rsa_key("stock", size=2048).name == "stock"
        assert [key.name for key in client.list_properties_of_keys()] == ["stock"]
