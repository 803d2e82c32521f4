"""A vault's folder: made whole or not at all, private, one server, and nothing of it opens elsewhere."""

from __future__ import annotations

import json
import shutil
import sqlite3
import ssl
from contextlib import closing
from pathlib import Path

import pytest
from cryptography import x509

from support.faults import no_file_beyond
from support.vault_doubles import Records
from virt_sse.errors import InvalidValueError, VaultError
from virt_sse.vault.home.certificates import needs_renewal
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import VaultRootKey
from virt_sse.vault.home.settings import HsmSettings, VaultSettings
from virt_sse.vault.initialise import add_administrator, initialise
from virt_sse.vault.keys.records import NewKey
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.vault import Vault, open_vault
from virt_sse.vault_client.permissions import USE


def test_a_vaults_files_are_private(directory: VaultDirectory) -> None:
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.path.iterdir()} == {
        path.name: 0o600 for path in directory.path.iterdir()
    }


def test_a_vault_is_never_made_over_another(directory: VaultDirectory) -> None:
    before = directory.root_key_path.read_bytes()
    with pytest.raises(VaultError, match="already"):
        initialise(directory.path)
    assert directory.root_key_path.read_bytes() == before


def test_leftovers_of_a_killed_init_are_replaced(directory: VaultDirectory) -> None:
    directory.settings_path.unlink()
    with pytest.raises(VaultError, match="no vault"):
        directory.settings()
    assert initialise(directory.path).settings().name == "vault"


@pytest.mark.parametrize("name", ["root.key", "vault.sqlite", "server.pem", "vault.json", "."])
def test_files_that_are_open_to_others_are_refused(directory: VaultDirectory, name: str) -> None:
    (directory.path / name).chmod(0o755)
    with pytest.raises(VaultError, match="open to others"):
        directory.settings()


def test_one_process_serves_a_vault(directory: VaultDirectory, vault: Vault, records: Records) -> None:
    with pytest.raises(VaultError, match="another process"), open_vault(directory, records):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"format": 2}', b'{"format": 1, "name": "x"}']
)
def test_damaged_settings_are_reported(directory: VaultDirectory, content: bytes) -> None:
    directory.settings_path.write_bytes(content)
    with pytest.raises(VaultError):
        directory.settings()


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"x": 1}, "`x`"),
        ({"hosts": "localhost"}, "`$.hosts`"),
        ({"retention_days": "90"}, "`$.retention_days`"),
        ({"tier": "gold"}, "`$.tier`"),
        ({"tier": "premium", "token": {"tag": "t", "pin": "1"}}, "`pin`"),
        ({"tier": "premium", "token": {"tag": "t", "options": {"uri": 1}}}, "`$.token.options"),
        ({"format": 2, "new": 1}, "newer version"),
    ],
)
def test_damaged_settings_name_the_field(
    directory: VaultDirectory, wrong: dict[str, object], field: str
) -> None:
    fields = json.loads(directory.settings_path.read_text())
    directory.settings_path.write_text(json.dumps(fields | wrong))
    with pytest.raises(VaultError) as caught:
        directory.settings()
    assert field in str(caught.value)


def test_settings_of_earlier_versions_are_read(directory: VaultDirectory) -> None:
    """The bytes that the first version wrote, and those with an HSM."""
    fields = {
        "name": "vault",
        "tenant": "6f9619ff-8b86-d011-b42d-00cf4fc964ff",
        "tier": "standard",
        "url": "https://localhost:8443",
        "audience": "https://localhost:8443",
        "hosts": ["localhost"],
        "retention_days": 90,
        "purge_protection": False,
        "format": 1,
    }
    directory.settings_path.write_text(json.dumps(fields, indent=2))
    assert directory.settings().hsm is None
    hsm = {"tag": "virt-sse-vault-0", "options": {"uri": "pkcs11:token=a"}}
    directory.settings_path.write_text(json.dumps(fields | {"tier": "premium", "token": hsm}, indent=2))
    assert directory.settings().hsm == HsmSettings("virt-sse-vault-0", {"uri": "pkcs11:token=a"})
    assert json.loads(directory.settings().to_json()) == fields | {"tier": "premium", "token": hsm}


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a"},
        {"name": "a--b"},
        {"name": "-abc"},
        {"name": "x" * 25},
        {"hosts": ()},
        {"hosts": ("a b",)},
        {"hosts": ("a", "https://b")},
        {"tenant": "ours"},
        {"retention_days": 6},
        {"retention_days": 91},
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError):
        initialise(tmp_path / "vault", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "vault").exists()


def test_written_settings_are_read_back(directory: VaultDirectory) -> None:
    settings = directory.settings()
    assert VaultSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("hosts", [("localhost", "127.0.0.1"), ("::1",), ("kv1.example.org", "10.1.2.3")])
def test_certificates_name_the_hosts(tmp_path: Path, hosts: tuple[str, ...]) -> None:
    directory = initialise(tmp_path / "vault", hosts=hosts)
    server = x509.load_pem_x509_certificate(directory.server_path.read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = [str(each.value) for each in names]
    assert found == list(hosts)
    assert not needs_renewal(directory.server_path.read_bytes())
    ca = x509.load_pem_x509_certificate(directory.ca_path.read_bytes())
    server.verify_directly_issued_by(ca)
    ssl.create_default_context(cafile=directory.ca_path)


def test_an_address_is_a_url(tmp_path: Path) -> None:
    assert initialise(tmp_path / "vault", hosts=("::1",), port=443).settings().url == "https://[::1]:443"


def test_another_root_key_opens_nothing(directory: VaultDirectory, records: Records) -> None:
    directory.root_key_path.write_bytes(bytes(32))
    with pytest.raises(VaultError, match="not the original root key"), open_vault(directory, records):
        pass
    directory.root_key_path.write_bytes(b"short")
    with pytest.raises(VaultError, match="32 bytes"), open_vault(directory, records):
        pass


def test_a_sealed_value_opens_for_its_own_purpose_alone() -> None:
    root = VaultRootKey(bytes(32), "tenant/vault")
    sealed = root.sealer("keys").seal(b"secret", b"context")
    assert root.sealer("keys").open(sealed, b"context") == b"secret"
    assert sealed != root.sealer("keys").seal(b"secret", b"context")
    wrong = [
        (root.sealer("backups"), sealed, b"context"),
        (VaultRootKey(bytes(32), "tenant/other").sealer("keys"), sealed, b"context"),
        (VaultRootKey(bytes(31) + b"\1", "tenant/vault").sealer("keys"), sealed, b"context"),
        (root.sealer("keys"), sealed, b"another"),
        (root.sealer("keys"), sealed[:-1], b"context"),
        (root.sealer("keys"), sealed[:-1] + bytes([sealed[-1] ^ 1]), b"context"),
        (root.sealer("keys"), b"\2" + sealed[1:], b"context"),
        (root.sealer("keys"), b"", b"context"),
    ]
    for sealer, blob, context in wrong:
        with pytest.raises(VaultError):
            sealer.open(blob, context)


def test_a_root_key_does_not_print() -> None:
    root = VaultRootKey(b"ROOTROOTROOTROOTROOTROOTROOTROOT", "v")
    assert "ROOT" not in repr(root) + repr(root.sealer("keys"))


def test_a_backup_restores_all_of_a_key(vault: Vault) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey(tags={"a": "b"}))
    vault.rotation.rotate("kek")
    vault.rotation.set_policy("kek", {"attributes": {"expiryTime": "P90D"}})
    before, policy = vault.keys.versions("kek"), vault.rotation.policy("kek")
    sealed = vault.keys.encrypt("wrapKey", "kek", before[0].version, "RSA-OAEP-256", b"dek")[1]
    blob = vault.backups.backup("kek")
    with pytest.raises(Refusal, match="exists already"):
        vault.backups.restore(blob)
    vault.keys.delete("kek")
    with pytest.raises(Refusal, match="deleted but recoverable"):
        vault.backups.restore(blob)
    vault.keys.purge("kek")
    assert vault.backups.restore(blob) == before[-1]
    assert (vault.keys.versions("kek"), vault.rotation.policy("kek")) == (before, policy)
    assert vault.keys.decrypt("unwrapKey", "kek", before[0].version, "RSA-OAEP-256", sealed)[1] == b"dek"
    for damaged in (blob[:-1], b"", blob[:20], bytes([blob[0] ^ 1]) + blob[1:]):
        with pytest.raises(Refusal, match="not a backup"):
            vault.backups.restore(damaged)


def test_a_backup_is_worth_nothing_to_another_vault(vault: Vault, tmp_path: Path, records: Records) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    blob = vault.backups.backup("kek")
    other = initialise(tmp_path / "other")
    with open_vault(other, records) as stranger, pytest.raises(Refusal, match="not a backup"):
        stranger.backups.restore(blob)


def test_the_database_of_a_newer_version_is_left_alone(directory: VaultDirectory, records: Records) -> None:
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.execute("UPDATE alembic_version SET version_num = '99'")
        database.commit()
    with pytest.raises(VaultError, match="schema 99"), open_vault(directory, records):
        pass
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.executescript("DROP TABLE alembic_version; PRAGMA user_version = 99")
    with pytest.raises(VaultError, match="schema 99"), open_vault(directory, records):
        pass


def test_a_file_that_is_no_database_is_reported(directory: VaultDirectory, records: Records) -> None:
    for name in ("vault.sqlite-wal", "vault.sqlite-shm"):
        (directory.path / name).unlink(missing_ok=True)
    directory.database_path.write_bytes(b"not a database" * 1000)
    with pytest.raises(VaultError, match="cannot open"), open_vault(directory, records):
        pass


def test_on_a_full_disk_nothing_is_lost(vault: Vault, directory: VaultDirectory) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    sizes = [path.stat().st_size for path in directory.path.glob("vault.sqlite*")]
    with no_file_beyond(min(sizes)), pytest.raises(Refusal) as refused:
        vault.keys.update("kek", "", attributes={"enabled": False}, operations=None, tags=None)
    assert refused.value.status == 503
    assert vault.keys.get("kek").attributes.enabled
    vault.keys.update("kek", "", attributes={"enabled": False}, operations=None, tags=None)
    assert not vault.keys.get("kek").attributes.enabled


def test_a_copy_of_the_folder_is_the_vault(
    directory: VaultDirectory, tmp_path: Path, records: Records
) -> None:
    with open_vault(directory, records) as vault:
        made = vault.keys.create("kek", "RSA", 2048, NewKey())
    copy = VaultDirectory(Path(shutil.copytree(directory.path, tmp_path / "copy")))
    with open_vault(copy, records) as vault:
        assert vault.keys.get("kek") == made


def test_the_first_administrator_may_not_use_keys(vault: Vault) -> None:
    assert vault.principals.get("administrator").permissions.isdisjoint(USE)


def test_the_owner_of_the_folder_can_make_an_administrator(
    directory: VaultDirectory, records: Records
) -> None:
    file = directory.path.parent / "second.json"
    add_administrator(directory, "second", file)
    with open_vault(directory, records) as vault:
        assert [principal.name for principal in vault.principals.all()] == ["administrator", "second"]
        with pytest.raises(VaultError, match="another process"):
            add_administrator(directory, "third", directory.path.parent / "third.json")
    with pytest.raises(VaultError, match="exists already"):
        add_administrator(directory, "third", file)
    with pytest.raises(VaultError, match="named second exists"):
        add_administrator(directory, "second", directory.path.parent / "third.json")
