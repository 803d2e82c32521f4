"""A premium vault: RSA-HSM keys through the SDK, a key provider, kill -9 and a guest."""

from __future__ import annotations

import base64
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.keyvault.keys import (
    JsonWebKey,
    KeyClient,
    KeyRotationLifetimeAction,
    KeyRotationPolicy,
    KeyRotationPolicyAction,
)
from azure.keyvault.keys.crypto import CryptographyClient, EncryptionAlgorithm, KeyWrapAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from support import images
from support.agent_site import CONFIG, CustomerSite, customer_site
from support.customer_keys import RIGHTS, CustomerKeys
from support.vault_tools import Raw, key_client, new_name, sdk_options
from support.waiting import wait_until
from virt_sse.errors import KeyDisabledError, KeyNotFoundError, KeyProviderUnavailableError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.lab.vaults import LabVault
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import Dek, DekContext, KeyState
from virt_sse.pkcs11.objects import TokenKey
from virt_sse.vault.hsm.protection import ANCHOR
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE

DEK = bytes(range(64))
CONTEXT = DekContext(uuid.UUID(int=7), "data")


@pytest.fixture(scope="module")
def token(lab_hsm: LabHsm) -> Iterator[LabToken]:
    with lab_hsm.token() as token:
        yield token


@pytest.fixture(scope="module")
def vault(token: LabToken) -> Iterator[LabVault]:
    """A premium vault on that token, which the tests look into, too."""
    with LabVault(premium=True, token=token) as vault:
        yield vault


@pytest.fixture(scope="module")
def credential(vault: LabVault) -> Iterator[VaultCredential]:
    with VaultClient(vault.administrator_path) as client:
        client.grant("administrator", USE)
    with VaultCredential(vault.administrator_path) as credential:
        yield credential


@pytest.fixture(scope="module")
def client(credential: VaultCredential) -> Iterator[KeyClient]:
    with key_client(credential) as client:
        yield client


@pytest.fixture
def keys(vault: LabVault, tmp_path: Path) -> Iterator[CustomerKeys]:
    with CustomerKeys(vault, tmp_path / "identities") as keys:
        yield keys


def in_token(token: LabToken, name: str = "") -> list[TokenKey]:
    """The keys of that name, or all."""
    with closing(token.open()) as opened:
        return [key for key in opened.find() if key.label.endswith(f"/{name[:32]}" if name else "")]


def refused(error: pytest.ExceptionInfo[HttpResponseError]) -> tuple[int | None, str | None]:
    return error.value.status_code, error.value.error and error.value.error.code


def encoded(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def web_key(private: rsa.RSAPrivateKey) -> dict[str, bytes]:
    numbers = private.private_numbers()
    public = numbers.public_numbers
    names = {"n": public.n, "e": public.e, "d": numbers.d, "p": numbers.p, "q": numbers.q}
    names |= {"dp": numbers.dmp1, "dq": numbers.dmq1, "qi": numbers.iqmp}
    return {name: encoded(number) for name, number in names.items()}


# --- Through the SDK


@pytest.mark.slow
@pytest.mark.parametrize("size", [2048, 3072])
def test_hsm_keys_wrap_and_unwrap(
    client: KeyClient, credential: VaultCredential, token: LabToken, size: int
) -> None:
    key = client.create_rsa_key(new_name(), size=size, hardware_protected=True)
    assert key.key_type == "RSA-HSM"
    with CryptographyClient(str(key.id), credential, **sdk_options(credential)) as remote:
        for algorithm in (KeyWrapAlgorithm.rsa_oaep_256, KeyWrapAlgorithm.rsa_oaep):
            wrapped = remote.wrap_key(algorithm, DEK)
            assert remote.unwrap_key(algorithm, wrapped.encrypted_key).key == DEK
        for encryption in (EncryptionAlgorithm.rsa_oaep_256, EncryptionAlgorithm.rsa_oaep):
            sealed = remote.encrypt(encryption, DEK)
            assert remote.decrypt(encryption, sealed.ciphertext).plaintext == DEK
        with pytest.raises(HttpResponseError) as error:
            remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, bytes(size // 8))
        assert refused(error) == (400, "BadParameter")
    (inside,) = in_token(token, str(key.name))
    assert (inside.bits, inside.is_never_extractable) == (size, True)
    assert key.key.n == encoded(inside.n or 0)


@pytest.mark.slow
def test_an_hsm_key_is_rotated_disabled_deleted_and_purged(
    client: KeyClient, credential: VaultCredential, token: LabToken
) -> None:
    name = new_name()
    first = client.create_rsa_key(name, hardware_protected=True)
    with CryptographyClient(str(first.id), credential, **sdk_options(credential)) as remote:
        wrapped = remote.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK).encrypted_key
        action = KeyRotationLifetimeAction(KeyRotationPolicyAction.rotate, time_before_expiry="P30D")
        client.update_key_rotation_policy(
            name, KeyRotationPolicy(expires_in="P90D", lifetime_actions=[action])
        )
        second = client.rotate_key(name)
        assert second.key_type == "RSA-HSM"
        assert second.properties.expires_on
        versions = {each.version for each in client.list_properties_of_key_versions(name)}
        assert versions == {first.properties.version, second.properties.version}
        assert remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == DEK
        assert {key.id.hex() for key in in_token(token, name)} == versions

        blob = client.backup_key(name)
        client.begin_delete_key(name).wait()
        with pytest.raises(ResourceNotFoundError):
            remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped)
        client.begin_recover_deleted_key(name).wait()
        assert remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == DEK
        client.begin_delete_key(name).wait()
        client.purge_deleted_key(name)
        assert in_token(token, name) == []
        with pytest.raises(ResourceExistsError, match="no longer in the HSM"):
            client.restore_key_backup(blob)


@pytest.mark.slow
@pytest.mark.parametrize("as_hsm_type", [False, True], ids=["hsm-true", "kty-rsa-hsm"])
def test_the_numbers_of_an_imported_key_are_in_no_file(
    client: KeyClient,
    credential: VaultCredential,
    vault: LabVault,
    token: LabToken,
    as_hsm_type: bool,
) -> None:
    private, name = rsa.generate_private_key(65537, 2048), new_name()
    numbers = web_key(private)
    if as_hsm_type:
        key = client.import_key(name, JsonWebKey(kty="RSA-HSM", **numbers), hardware_protected=None)
    else:
        key = client.import_key(name, JsonWebKey(kty="RSA", **numbers), hardware_protected=True)
    assert key.key_type == "RSA-HSM"
    with CryptographyClient(str(key.id), credential, **sdk_options(credential)) as remote:
        wrapped = remote.wrap_key(KeyWrapAlgorithm.rsa_oaep_256, DEK).encrypted_key
        assert remote.unwrap_key(KeyWrapAlgorithm.rsa_oaep_256, wrapped).key == DEK
    (inside,) = in_token(token, name)
    assert not inside.is_extractable
    secrets = [numbers[each] for each in ("d", "p", "q", "dp", "dq", "qi")]
    der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    secrets += [der[200:300], base64.b64encode(der)[200:300]]
    secrets += [base64.urlsafe_b64encode(each).rstrip(b"=") for each in secrets]
    folders = (vault.directory.parent, token.folder.path.parent)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert images.contains(files, numbers["n"]), "the search looks in the wrong place"
    assert vault.log_path in files
    assert not images.contains(files, *secrets, *(each.hex().encode() for each in secrets))


# --- As a key provider sees it


def test_the_provider_uses_hsm_keys_and_tells_a_verdict_from_silence(
    keys: CustomerKeys, vault: LabVault, token: LabToken
) -> None:
    provider, dek = keys.open_provider(keys.new_identity(*RIGHTS)), Dek.generate()
    url = keys.new_key(in_hsm=True)
    key = provider.current_key(url)
    wrapped = provider.wrap(dek, key, context=CONTEXT)
    assert provider.unwrap(wrapped, context=CONTEXT) == dek
    assert provider.key_state(key) is KeyState.ENABLED
    (inside,) = in_token(token, url.rsplit("/", 1)[1])
    tokens = token.folder.path.parent / "tokens"
    hidden = tokens.with_name("hidden")
    with closing(token.open()) as administrator:
        administrator.set_enabled(inside, False)
        with pytest.raises(KeyDisabledError):
            provider.unwrap(wrapped, context=CONTEXT)
        administrator.set_enabled(inside, True)
        assert provider.unwrap(wrapped, context=CONTEXT) == dek
        tokens.rename(hidden)
        try:
            for use in (
                lambda: provider.unwrap(wrapped, context=CONTEXT),
                lambda: provider.wrap(dek, key, context=CONTEXT),
            ):
                with pytest.raises(KeyProviderUnavailableError, match="503 ServiceUnavailable"):
                    use()
            with VaultClient(vault.administrator_path) as client:
                assert str(client.status()["hsm"]).startswith("unavailable: ")
        finally:
            with suppress(FileNotFoundError):
                tokens.rmdir()
            hidden.rename(tokens)
        assert provider.unwrap(wrapped, context=CONTEXT) == dek
        administrator.destroy(inside)
    with pytest.raises(KeyNotFoundError):
        provider.unwrap(wrapped, context=CONTEXT)
    with VaultClient(vault.administrator_path) as client:
        assert client.status()["hsm"] == "available"


# --- Killed


@pytest.mark.slow
def test_a_key_of_a_killed_creation_is_destroyed(lab_hsm: LabHsm) -> None:
    with lab_hsm.token() as token, LabVault(premium=True, token=token) as vault:
        bearer = VaultCredential(vault.administrator_path).token()
        with Raw(vault, bearer) as raw:
            for name in ("live", "deleted"):
                assert raw("POST", f"/keys/{name}/create", {"kty": "RSA-HSM"}).status == 200
            raw("DELETE", "/keys/deleted")
        with closing(sqlite3.connect(vault.directory / "vault.sqlite", isolation_level=None)) as database:
            kill_once_a_key_is_in_the_token(vault, token, bearer, database)
            named = {row[0] for row in database.execute("SELECT version FROM versions")}
            ((left_over,),) = database.execute("SELECT version FROM leftovers")
            assert ids(token) == named | {left_over}
            vault.start()
            assert ids(token) == named
            assert database.execute("SELECT version FROM leftovers").fetchall() == []
        with Raw(vault, bearer) as raw:
            assert raw("POST", "/deletedkeys/deleted/recover").status == 200
            names = [item["kid"].rsplit("/", 1)[1] for item in raw("GET", "/keys").body["value"]]
            assert names == ["deleted", "live"]


def ids(token: LabToken) -> set[str]:
    return {key.id.hex() for key in in_token(token) if key.id != ANCHOR}


def kill_once_a_key_is_in_the_token(
    vault: LabVault, token: LabToken, bearer: str, database: sqlite3.Connection
) -> None:
    """Between the token's making it and the vault's storing it, which waits for a lock on the database."""

    def create() -> None:
        with Raw(vault, bearer) as raw, suppress(OSError, HTTPException):
            raw("POST", "/keys/lost/create", {"kty": "RSA-HSM", "key_size": 3072})

    before, maker = ids(token), threading.Thread(target=create)
    maker.start()
    wait_until(
        lambda: database.execute("SELECT * FROM leftovers").fetchall(), "the vault has recorded a leftover"
    )
    database.execute("BEGIN IMMEDIATE")
    try:
        wait_until(lambda: ids(token) != before, "the leftover key is gone from the HSM token")
        vault.kill()
    finally:
        database.execute("ROLLBACK")
    maker.join(30)


# --- A guest


@pytest.fixture(scope="module")
def site(
    lab_host: LabHost, vault: LabVault, acceleration: Callable[[str], Acceleration]
) -> Iterator[CustomerSite]:
    config = CONFIG.replace("probe-seconds = 3", "probe-seconds = 1") + "poll-seconds = 0.4\n"
    with customer_site(lab_host, vault, acceleration("boot-sector"), config) as site:
        yield site
        site.forget_domains()


def new_set(site: CustomerSite) -> EncryptionSet:
    made = site.backend.sets.create(
        f"s{uuid.uuid4().hex[:8]}",
        provider="customer-managed",
        key=site.keys.new_key(in_hsm=True),
        grace_seconds=0,
    )
    site.grant(made)
    return made


def test_a_guest_boots_from_a_disk_under_an_hsm_key_and_ends_with_the_key(site: CustomerSite) -> None:
    guest, disk = site.guest(new_set(site).name)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    assert wait_until(lambda: not guest.is_active(), "the guest has ended") < 5
    assert "KeyDisabled" in site.refusal(guest)
    site.enable(disk)
    guest.start()
    site.wait_until_watched(guest)


def test_a_destroyed_key_ends_its_guest_and_a_missing_hsm_token_ends_none(
    site: CustomerSite, token: LabToken
) -> None:
    taken = new_set(site)
    (guest, _), (other, _) = (site.guest(each.name) for each in (taken, new_set(site)))
    for each in (guest, other):
        each.start()
        site.wait_until_watched(each)
    tokens = token.folder.path.parent / "tokens"
    hidden = tokens.with_name("hidden")
    tokens.rename(hidden)
    try:
        site.wait_for_event("key-state", state="unreachable")
        time.sleep(1.5)
        assert guest.is_active()
        assert other.is_active()
    finally:
        with suppress(FileNotFoundError):
            tokens.rmdir()
        hidden.rename(tokens)
    site.wait_until_watched(guest)
    with closing(token.open()) as administrator:
        (inside,) = in_token(token, taken.key.name.rsplit("/", 1)[1])
        administrator.destroy(inside)
    assert wait_until(lambda: not guest.is_active(), "the guest has ended") < 8  # it takes a probe
    assert "KeyNotFound" in site.refusal(guest)
    assert other.is_active()
