"""RSA-HSM keys in a real token: what the vault says of them, what it leaves there, what it never destroys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from support.vault_doubles import DAY, Clock, Records
from virt_sse.errors import ConfigError, InvalidValueError, KeyProviderUnavailableError, VaultError
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.pkcs11.objects import TokenKey
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import HsmSettings, Tier, VaultSettings
from virt_sse.vault.hsm.access import add_hsm, unlock_hsm
from virt_sse.vault.hsm.protection import ANCHOR
from virt_sse.vault.initialise import initialise
from virt_sse.vault.keys.records import KeyVersion, Leftover, NewKey
from virt_sse.vault.refusals import FailureRefusal, Refusal
from virt_sse.vault.vault import Vault, open_vault

OAEP = "RSA-OAEP-256"


def options_of(token: LabToken) -> dict[str, str]:
    return {name: str(value) for name, value in token.options.items()}


def premium(path: Path, token: LabToken) -> VaultDirectory:
    return initialise(path, tier=Tier.PREMIUM, hsm=options_of(token))


@pytest.fixture(scope="module")
def token(lab_hsm: LabHsm) -> Iterator[LabToken]:
    """Several vaults share it."""
    with lab_hsm.token() as token:
        yield token


@pytest.fixture
def directory(tmp_path: Path, token: LabToken) -> VaultDirectory:
    return premium(tmp_path / "vault", token)


@pytest.fixture
def vault(directory: VaultDirectory, clock: Clock, records: Records) -> Iterator[Vault]:
    with open_vault(directory, records, clock=clock) as vault:
        yield vault


def create(vault: Vault, name: str = "kek") -> KeyVersion:
    return vault.keys.create(name, "RSA-HSM", 2048, NewKey())


def use(vault: Vault, record: KeyVersion, algorithm: str = OAEP) -> None:
    """Wrap and unwrap."""
    _, wrapped = vault.keys.encrypt("wrapKey", record.name, record.version, algorithm, b"dek")
    assert vault.keys.decrypt("unwrapKey", record.name, record.version, algorithm, wrapped)[1] == b"dek"


def refusal_of(vault: Vault, record: KeyVersion) -> tuple[int, str]:
    """To unwrapping and to wrapping, which must agree: a DEK wrapped by what does not unwrap is lost."""
    sealed = record.public.encrypt(b"dek", OAEP)
    said = set()
    for use in (
        lambda: vault.keys.decrypt("unwrapKey", record.name, record.version, OAEP, sealed),
        lambda: vault.keys.encrypt("wrapKey", record.name, record.version, OAEP, b"dek"),
    ):
        with pytest.raises(Refusal) as refused:
            use()
        said.add((refused.value.status, refused.value.reason))
    (only,) = said
    return only


def in_token(token: LabToken, directory: VaultDirectory) -> list[TokenKey]:
    """The vault's keys there, as another process sees them."""
    settings = directory.settings().hsm
    assert settings
    with closing(token.open()) as opened:
        return [key for key in opened.find() if key.label.startswith(settings.tag) and key.id != ANCHOR]


@contextlib.contextmanager
def away(token: LabToken) -> Iterator[None]:
    """While the token is pulled out."""
    folder = token.folder.path.parent / "tokens"
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        hidden.rename(folder)


@pytest.mark.parametrize("algorithm", [OAEP, "RSA-OAEP"])
def test_a_key_is_made_and_used_in_the_token(
    vault: Vault, directory: VaultDirectory, token: LabToken, algorithm: str
) -> None:
    record = create(vault)
    use(vault, record, algorithm)
    (key,) = in_token(token, directory)
    assert (key.n, key.id.hex(), key.is_never_extractable) == (record.public.n, record.version, True)
    assert key.label.endswith("/kek")


@pytest.mark.slow
def test_an_imported_key_is_in_the_token_and_nowhere_else(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    record = vault.keys.import_key("mine", "RSA-HSM", numbers, NewKey())
    assert record.public.n == numbers.public_numbers.n
    use(vault, record)
    (key,) = in_token(token, directory)
    assert not key.is_extractable
    files = [*directory.path.rglob("*"), *token.folder.path.parent.rglob("*")]
    stored = b"".join(path.read_bytes() for path in files if path.is_file())
    for secret in (numbers.d, numbers.p, numbers.q):
        assert secret.to_bytes((secret.bit_length() + 7) // 8, "big") not in stored
    modulus = numbers.public_numbers.n
    assert modulus.to_bytes(256, "big") in stored, "the search looks in the wrong place"


def test_every_way_to_fail_an_unwrap_looks_the_same(vault: Vault) -> None:
    record, other = create(vault), create(vault, "other")
    good = record.public.encrypt(b"dek", OAEP)
    said = set()
    for wrong in (
        good[:-1],
        good + b"\0",
        bytes([good[0] ^ 1]) + good[1:],
        other.public.encrypt(b"dek", OAEP),
        record.public.encrypt(b"dek", "RSA-OAEP"),
        b"",
        bytes(256),
        b"\xff" * 256,
    ):
        with pytest.raises(Refusal) as refused:
            vault.keys.decrypt("unwrapKey", "kek", "", OAEP, wrong)
        said.add((refused.value.status, refused.value.code, refused.value.message))
    assert said == {(400, "BadParameter", "The parameter is incorrect.")}


def test_versions_and_both_kinds_of_key_live_together(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    first = create(vault)
    second = vault.rotation.rotate("kek")
    software = vault.keys.create("kek", "RSA", 2048, NewKey())
    assert [each.key_type for each in vault.keys.versions("kek")] == ["RSA-HSM", "RSA-HSM", "RSA"]
    for record in (first, second, software):
        use(vault, record)
    assert {key.id.hex() for key in in_token(token, directory)} == {first.version, second.version}
    vault.keys.update("kek", first.version, attributes={"enabled": False}, operations=None, tags=None)
    assert refusal_of(vault, first) == (403, "KeyDisabled")
    use(vault, second)


def test_purging_destroys_in_the_token_and_deleting_does_not(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    record, other = create(vault), create(vault, "other")
    vault.rotation.rotate("kek")
    vault.keys.delete("kek")
    vault.keys.sweep()
    assert len(in_token(token, directory)) == 3
    vault.keys.recover("kek")
    use(vault, record)
    vault.keys.delete("kek")
    vault.keys.purge("kek")
    assert [key.id.hex() for key in in_token(token, directory)] == [other.version]
    use(vault, other)


def test_vaults_share_a_token(
    vault: Vault, directory: VaultDirectory, token: LabToken, tmp_path: Path, records: Records
) -> None:
    second = premium(tmp_path / "second", token)
    with open_vault(second, records) as neighbour:
        mine, theirs = create(vault), create(neighbour)
        vault.keys.delete("kek")
        vault.keys.purge("kek")
        neighbour.keys.sweep()
        use(neighbour, theirs)
    assert in_token(token, directory) == []
    assert [key.id.hex() for key in in_token(token, second)] == [theirs.version] != [mine.version]


def test_a_key_disabled_or_destroyed_in_the_token_is_so_in_the_vault(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    record = create(vault)
    use(vault, record)
    (key,) = in_token(token, directory)
    with closing(token.open()) as administrator:
        administrator.set_enabled(key, False)
        assert refusal_of(vault, record) == (403, "KeyDisabled")
        administrator.set_enabled(key, True)
        use(vault, record)
        administrator.destroy(key)
        assert refusal_of(vault, record) == (404, "KeyNotFound")
        assert vault.hsm
        assert vault.hsm.failure() is None


def test_an_emptied_token_gives_no_verdict_about_a_key(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    record = create(vault)
    settings = directory.settings().hsm
    assert settings
    with closing(token.open()) as administrator:
        for key in administrator.find():
            if key.label.startswith(settings.tag):
                administrator.destroy(key)
    assert refusal_of(vault, record) == (503, "ServiceUnavailable")
    assert vault.hsm
    assert "anchor" in str(vault.hsm.failure())


def test_a_missing_token_gives_no_verdict_about_a_key(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    record, software = create(vault), vault.keys.create("soft", "RSA", 2048, NewKey())
    vault.keys.create("gone", "RSA-HSM", 2048, NewKey())
    vault.keys.delete("gone")
    with away(token):
        assert refusal_of(vault, record) == (503, "ServiceUnavailable")
        for change in (lambda: create(vault), lambda: vault.keys.purge("gone")):
            with pytest.raises(FailureRefusal, match="cannot use its HSM now"):
                change()
        use(vault, software)
        assert vault.hsm
        assert "HSM failed" in str(vault.hsm.failure())
    use(vault, record)
    assert vault.keys.get_deleted("gone")
    assert [each.version for each in vault.keys.versions("kek")] == [record.version]


def test_a_purge_that_is_due_is_finished_when_the_token_is_back(
    vault: Vault, directory: VaultDirectory, token: LabToken, clock: Clock
) -> None:
    create(vault)
    vault.keys.delete("kek")
    clock.now += 91 * DAY
    with away(token):
        assert vault.keys.due_for_purge() == ["kek"]
        vault.keys.purge_due("kek")
        assert vault.keys.count() == (0, 0)
        vault.keys.sweep()
    assert len(in_token(token, directory)) == 1
    vault.keys.sweep()
    assert in_token(token, directory) == []


def test_keys_without_a_row_are_destroyed_and_keys_with_a_row_stay(
    directory: VaultDirectory, token: LabToken, records: Records
) -> None:
    with open_vault(directory, records) as vault:
        live, deleted = create(vault), create(vault, "deleted")
        vault.keys.delete("deleted")
        assert vault.hsm
        orphan = Leftover("kek", os.urandom(16).hex(), "RSA-HSM")
        vault.hsm.generate(2048, orphan.name, orphan.version)
    settings = directory.settings().hsm
    assert settings
    with closing(token.open()) as administrator:
        stranger = administrator.generate_rsa(f"{settings.tag}/older", os.urandom(16), 2048)
    rows = [orphan, *(Leftover(each.name, each.version, "RSA-HSM") for each in (live, deleted))]
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.executemany(
            "INSERT INTO leftovers (name, version, key_type) VALUES (?, ?, ?)",
            [dataclasses.astuple(row) for row in rows],
        )
        database.commit()
    with open_vault(directory, records) as vault:
        kept = {key.id.hex() for key in in_token(token, directory)}
        assert kept == {live.version, deleted.version, stranger.id.hex()}
        vault.keys.recover("deleted")
        use(vault, live)
        use(vault, deleted)


def test_a_key_that_cannot_be_stored_leaves_nothing(
    vault: Vault, directory: VaultDirectory, token: LabToken
) -> None:
    create(vault)
    vault.keys.delete("kek")
    with pytest.raises(Refusal, match="deleted but recoverable"):
        create(vault)
    assert len(in_token(token, directory)) == 1
    with closing(sqlite3.connect(directory.database_path)) as database:
        assert database.execute("SELECT * FROM leftovers").fetchall() == []


def test_a_backup_brings_a_key_back_as_long_as_the_token_has_it(
    vault: Vault, directory: VaultDirectory, token: LabToken, clock: Clock
) -> None:
    record = create(vault)
    vault.rotation.rotate("kek")
    blob = vault.backups.backup("kek")
    vault.keys.delete("kek")
    clock.now += 91 * DAY
    with away(token):
        vault.keys.purge_due("kek")  # which therefore leaves the keys in the token
        with pytest.raises(FailureRefusal):
            vault.backups.restore(blob)
    vault.backups.restore(blob)
    vault.keys.sweep()
    use(vault, record)
    assert len(in_token(token, directory)) == 2
    vault.keys.delete("kek")
    vault.keys.purge("kek")
    with pytest.raises(Refusal, match="no longer in the HSM") as refused:
        vault.backups.restore(blob)
    assert refused.value.status == 409


def test_stored_handles_open_as_their_own_version_only(vault: Vault, directory: VaultDirectory) -> None:
    create(vault, "a")
    record = create(vault, "b")
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.execute(
            "UPDATE versions SET stored = (SELECT stored FROM versions WHERE name = 'a') WHERE name = 'b'"
        )
        database.commit()
    with pytest.raises(VaultError, match="sealed for this purpose"):
        use(vault, record)


@pytest.mark.slow
def test_a_wrong_pin_locks_until_it_is_unlocked(
    directory: VaultDirectory, token: LabToken, records: Records
) -> None:
    with open_vault(directory, records) as vault:
        record = create(vault)
    right = token.folder.pin.read_bytes()
    token.folder.pin.write_bytes(b"wrong")
    try:
        with open_vault(directory, records) as vault:
            for _ in range(4):
                assert refusal_of(vault, record) == (503, "ServiceUnavailable")
            assert vault.hsm
            assert "locked after 3 wrong PINs" in str(vault.hsm.failure())
            use(vault, vault.keys.create("soft", "RSA", 2048, NewKey()))
            with pytest.raises(KeyProviderUnavailableError, match="rejected the PIN as wrong"):
                unlock_hsm(directory)
            token.folder.pin.write_bytes(right)
            unlock_hsm(directory)
            use(vault, record)
    finally:
        token.folder.pin.write_bytes(right)


def test_a_dead_module_gives_no_verdict_about_a_key(
    directory: VaultDirectory, token: LabToken, records: Records
) -> None:
    with open_vault(directory, records) as vault:
        record = create(vault)
    settings = directory.settings()
    assert settings.hsm
    broken = {**settings.hsm.options, "module": str(directory.ca_path)}
    changed = msgspec.structs.replace(settings, hsm=HsmSettings(settings.hsm.tag, broken))
    directory.settings_path.write_bytes(changed.to_json())
    with open_vault(directory, records) as vault:
        assert refusal_of(vault, record) == (503, "ServiceUnavailable")
        assert vault.hsm
        assert "cannot load PKCS#11 module" in str(vault.hsm.failure())


def test_a_vault_without_its_token_settings_gives_no_verdict(
    directory: VaultDirectory, records: Records
) -> None:
    with open_vault(directory, records) as vault:
        record = create(vault)
    for tier in (Tier.PREMIUM, Tier.STANDARD):
        changed = msgspec.structs.replace(directory.settings(), tier=tier, hsm=None)
        directory.settings_path.write_bytes(changed.to_json())
        with open_vault(directory, records) as vault:
            assert refusal_of(vault, record) == (503, "ServiceUnavailable")


def test_an_older_premium_vault_is_given_a_token(
    pristine: VaultDirectory, tmp_path: Path, token: LabToken, records: Records
) -> None:
    directory = VaultDirectory(Path(shutil.copytree(pristine.path, tmp_path / "older")))
    fields = json.loads(directory.settings_path.read_text())
    assert "token" not in fields
    directory.settings_path.write_text(json.dumps(fields | {"tier": "premium"}))
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.executescript(
            "DROP TABLE leftovers; DROP TABLE changes; DROP TABLE key_permissions;"
            "DROP INDEX keys_by_lower_name;"
            "DROP TABLE alembic_version; PRAGMA user_version = 1;"
        )
    with open_vault(directory, records) as vault:
        with pytest.raises(Refusal, match="vault hsm add") as refused:
            create(vault)
        assert refused.value.status == 403
        with pytest.raises(VaultError, match="another process"):
            add_hsm(directory, options_of(token))
    add_hsm(directory, options_of(token))
    with open_vault(directory, records) as vault:
        use(vault, create(vault))
    with pytest.raises(VaultError, match="has an HSM already"):
        add_hsm(directory, options_of(token))


def test_written_token_settings_are_read_back(directory: VaultDirectory, token: LabToken) -> None:
    settings = directory.settings()
    assert VaultSettings.from_json(settings.to_json()) == settings
    assert settings.hsm
    assert f"serial={token.uri.serial}" in settings.hsm.options["uri"]
    assert token.pin not in directory.settings_path.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "pkcs11:"}, "does not name a token"),
        ({"uri": "pkcs11:token=x;pin-value=1234"}, "may not hold a PIN"),
        ({"uri": "pkcs11:token=x;object=y"}, "not a key inside"),
        ({"uri": "pkcs11:token=x", "module": "no-such-module"}, "no PKCS#11 module"),
        ({"uri": "pkcs11:token=x", "pin": "1234"}, "unknown option"),
    ],
)
def test_invalid_token_settings_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initialise(tmp_path / "vault", tier=Tier.PREMIUM, hsm=options)
    assert not (tmp_path / "vault/vault.json").exists()


def test_no_vault_is_made_over_a_missing_token(tmp_path: Path, token: LabToken) -> None:
    wrong = options_of(token) | {"uri": "pkcs11:token=elsewhere"}
    with pytest.raises(KeyProviderUnavailableError, match="no token matches"):
        initialise(tmp_path / "vault", tier=Tier.PREMIUM, hsm=wrong)
    with pytest.raises(InvalidValueError, match="standard vault has no HSM"):
        initialise(tmp_path / "vault", hsm=options_of(token))
    assert premium(tmp_path / "vault", token).settings().tier is Tier.PREMIUM
