"""The rules of keys: who may be used when, and what a change does to what is in memory."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from support.vault_doubles import Clock
from virt_sse.errors import VaultError
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.keys.records import Attributes, KeyVersion, NewKey
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.vault import Vault

OAEP = "RSA-OAEP-256"
USES = ("wrapKey", "encrypt", "unwrapKey", "decrypt")


def create(vault: Vault, name: str = "kek", attributes: Attributes = Attributes()) -> KeyVersion:  # noqa: B008 -- frozen
    return vault.keys.create(name, "RSA", 2048, NewKey(attributes=attributes))


def use(vault: Vault, operation: str, name: str = "kek", version: str = "") -> str:
    """What using the key comes to: ``ok``, or the reason of the refusal."""
    record = vault.keys.get(name, version)
    try:
        if operation in ("wrapKey", "encrypt"):
            vault.keys.encrypt(operation, name, version, OAEP, b"dek")
        else:
            sealed = record.public.encrypt(b"dek", OAEP)
            assert vault.keys.decrypt(operation, name, version, OAEP, sealed)[1] == b"dek"
    except Refusal as refusal:
        return refusal.reason if refusal.status == 403 else str(refusal.status)
    return "ok"


def refusal_of(vault: Vault, name: str = "kek") -> str:
    with pytest.raises(Refusal) as refused:
        vault.keys.encrypt("wrapKey", name, "", OAEP, b"dek")
    return refused.value.reason


@pytest.mark.parametrize("operation", USES)
def test_a_disabled_key_refuses_all_uses_and_an_enabled_one_none(vault: Vault, operation: str) -> None:
    create(vault)
    assert use(vault, operation) == "ok"
    vault.keys.update("kek", "", attributes={"enabled": False}, operations=None, tags=None)
    assert use(vault, operation) == "KeyDisabled"
    vault.keys.update("kek", "", attributes={"enabled": True}, operations=None, tags=None)
    assert use(vault, operation) == "ok"


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        (Attributes(not_before=1_800_000_060), "KeyNotYetValid"),
        (Attributes(expires=1_800_000_000), "KeyExpired"),
        (Attributes(not_before=1_799_999_999, expires=1_800_000_001), "ok"),
    ],
)
def test_outside_its_time_a_key_unwraps_but_does_not_wrap(
    vault: Vault, attributes: Attributes, reason: str
) -> None:
    create(vault, attributes=attributes)
    assert [use(vault, operation) for operation in USES] == [reason, reason, "ok", "ok"]


def test_time_alone_ends_wrapping(vault: Vault, clock: Clock) -> None:
    create(vault, attributes=Attributes(expires=1_800_000_060))
    assert use(vault, "wrapKey") == "ok"
    clock.now += 60
    assert use(vault, "wrapKey") == "KeyExpired"


def test_a_key_permits_only_its_operations(vault: Vault) -> None:
    create(vault)
    vault.keys.update("kek", "", attributes={}, operations=("unwrapKey",), tags=None)
    assert [use(vault, operation) for operation in USES] == [
        *("KeyOperationForbidden", "KeyOperationForbidden", "ok", "KeyOperationForbidden")
    ]


def test_each_version_is_disabled_for_itself(vault: Vault) -> None:
    old = create(vault)
    new = vault.rotation.rotate("kek")
    vault.keys.update("kek", old.version, attributes={"enabled": False}, operations=None, tags=None)
    assert use(vault, "unwrapKey", version=old.version) == "KeyDisabled"
    assert use(vault, "unwrapKey", version=new.version) == "ok"
    assert use(vault, "unwrapKey") == "ok"


def test_the_newest_version_is_used_at_once(vault: Vault) -> None:
    create(vault)
    before = vault.keys.encrypt("wrapKey", "kek", "", OAEP, b"dek")[0]
    new = vault.rotation.rotate("kek")
    assert vault.keys.encrypt("wrapKey", "kek", "", OAEP, b"dek")[0].version == new.version != before.version


def test_a_deleted_key_is_not_found_until_it_is_recovered(vault: Vault) -> None:
    create(vault)
    assert use(vault, "unwrapKey") == "ok"
    vault.keys.delete("kek")
    assert refusal_of(vault) == "KeyNotFound"
    with pytest.raises(Refusal, match="recovered or purged"):
        create(vault)
    vault.keys.recover("kek")
    assert use(vault, "unwrapKey") == "ok"


def test_a_purged_key_is_gone_for_good(vault: Vault) -> None:
    create(vault)
    vault.keys.delete("kek")
    vault.keys.purge("kek")
    for lost in (lambda: vault.keys.recover("kek"), lambda: vault.keys.get("kek")):
        with pytest.raises(Refusal, match="not found"):
            lost()
    assert vault.keys.count() == (0, 0)


@pytest.mark.parametrize("bits", [0, 512, 1024, 2047, 2049, 8192, -2048])
def test_a_key_of_another_size_is_refused(vault: Vault, bits: int) -> None:
    with pytest.raises(Refusal) as refused:
        vault.keys.create("kek", "RSA", bits, NewKey())
    assert (refused.value.status, refused.value.code) == (400, "BadParameter")


@pytest.mark.parametrize("kind", ["EC", "oct", "oct-HSM", "rsa", ""])
def test_a_key_of_another_type_is_refused(vault: Vault, kind: str) -> None:
    with pytest.raises(Refusal, match="not supported"):
        vault.keys.create("kek", kind, 2048, NewKey())


@pytest.mark.parametrize("algorithm", ["RSA1_5", "RSA-OAEP-512", "A256KW", "", "none"])
def test_another_algorithm_is_refused(vault: Vault, algorithm: str) -> None:
    create(vault)
    with pytest.raises(Refusal, match="alg"):
        vault.keys.decrypt("unwrapKey", "kek", "", algorithm, bytes(256))


def test_every_way_to_fail_an_unwrap_looks_the_same(vault: Vault) -> None:
    create(vault)
    create(vault, "other")
    _, good = vault.keys.encrypt("wrapKey", "kek", "", OAEP, b"dek")
    _, other = vault.keys.encrypt("wrapKey", "other", "", OAEP, b"dek")
    _, sha1 = vault.keys.encrypt("wrapKey", "kek", "", "RSA-OAEP", b"dek")
    said = set()
    for wrong in (
        good[:-1],
        good + b"\0",
        bytes([good[0] ^ 1]) + good[1:],
        other,
        sha1,
        b"",
        bytes(256),
        b"\xff" * 256,
    ):
        with pytest.raises(Refusal) as refused:
            vault.keys.decrypt("unwrapKey", "kek", "", OAEP, wrong)
        said.add((refused.value.status, refused.value.code, refused.value.message))
    assert len(said) == 1


def test_a_payload_too_long_for_the_key_is_refused(vault: Vault) -> None:
    create(vault)
    vault.keys.encrypt("wrapKey", "kek", "", OAEP, bytes(190))
    with pytest.raises(Refusal, match="at most 190 bytes"):
        vault.keys.encrypt("wrapKey", "kek", "", OAEP, bytes(191))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2048, 3072])
def test_a_key_made_elsewhere_is_imported(vault: Vault, bits: int) -> None:
    private = rsa.generate_private_key(65537, bits)
    record = vault.keys.import_key("mine", "RSA", private.private_numbers(), NewKey())
    assert record.public.n == private.public_key().public_numbers().n
    assert use(vault, "unwrapKey", "mine") == "ok"


@pytest.mark.slow
def test_numbers_that_do_not_fit_together_are_no_key(vault: Vault) -> None:
    numbers = rsa.generate_private_key(65537, 2048).private_numbers()
    other = rsa.generate_private_key(65537, 2048).private_numbers()
    mixed = rsa.RSAPrivateNumbers(
        other.p, numbers.q, numbers.d, numbers.dmp1, numbers.dmq1, numbers.iqmp, numbers.public_numbers
    )
    weak = rsa.generate_private_key(65537, 1024).private_numbers()  # noqa: S505 -- to be refused
    odd = rsa.generate_private_key(3, 2048).private_numbers()
    for wrong in (mixed, weak, odd):
        with pytest.raises(Refusal) as refused:
            vault.keys.import_key("mine", "RSA", wrong, NewKey())
        assert refused.value.status == 400


def test_no_private_key_lies_in_the_database(vault: Vault, directory: VaultDirectory) -> None:
    private = rsa.generate_private_key(65537, 2048)
    numbers = private.private_numbers()
    vault.keys.import_key("mine", "RSA", numbers, NewKey())
    stored = b"".join(path.read_bytes() for path in directory.path.iterdir())
    for secret in (numbers.d, numbers.p, numbers.q):
        assert secret.to_bytes((secret.bit_length() + 7) // 8, "big") not in stored
    modulus = numbers.public_numbers.n
    assert modulus.to_bytes(256, "big") in stored, "the search looks in the wrong place"


def test_stored_material_opens_as_its_own_version_only(vault: Vault, directory: VaultDirectory) -> None:
    create(vault, "a")
    create(vault, "b")
    with closing(sqlite3.connect(directory.database_path)) as database:
        database.execute(
            "UPDATE versions SET stored = (SELECT stored FROM versions WHERE name = 'a') WHERE name = 'b'"
        )
        database.commit()
    with pytest.raises(VaultError, match="sealed for this purpose"):
        vault.keys.encrypt("wrapKey", "b", "", OAEP, b"dek")


def test_an_invalid_time_window_is_refused(vault: Vault) -> None:
    with pytest.raises(Refusal, match="earlier"):
        create(vault, attributes=Attributes(not_before=2, expires=2))
    create(vault)
    with pytest.raises(Refusal, match="earlier"):
        vault.keys.update("kek", "", attributes={"not_before": 3, "expires": 2}, operations=None, tags=None)


@pytest.mark.parametrize("name", ["", "a_b", "a/b", "ä", "a\0", "a" * 128, "a b", "a\n"])
def test_an_invalid_name_is_refused(vault: Vault, name: str) -> None:
    for asked in (lambda: create(vault, name), lambda: vault.keys.get(name), lambda: vault.keys.delete(name)):
        with pytest.raises(Refusal) as refused:
            asked()
        assert refused.value.status == 400


def test_material_and_keys_do_not_print(vault: Vault) -> None:
    record = create(vault)
    opened = vault.keys._usable("unwrapKey", "kek", "", OAEP)
    stored = record.stored
    assert repr(stored)[2:20] not in repr(record) + repr(opened)
    assert "RSAPrivateKey" not in repr(opened)


def test_names_differ_by_more_than_case(vault: Vault) -> None:
    first = vault.keys.create("Web", "RSA", 2048, NewKey())
    second = vault.keys.create("web", "RSA", 2048, NewKey())
    assert second.name == "Web"
    assert vault.keys.versions("WEB") == [first, second]
    assert vault.keys.count() == (1, 0)
    used, wrapped = vault.keys.encrypt("wrapKey", "wEB", first.version, "RSA-OAEP-256", b"dek")
    assert used == first
    assert vault.keys.decrypt("unwrapKey", "web", first.version, "RSA-OAEP-256", wrapped)[1] == b"dek"
    vault.keys.update("WEB", first.version, attributes={"enabled": False}, operations=None, tags=None)
    with pytest.raises(Refusal, match="disabled"):
        vault.keys.encrypt("wrapKey", "wEB", first.version, "RSA-OAEP-256", b"dek")
    vault.rotation.set_policy("web", {"attributes": {"expiryTime": "P90D"}})
    assert vault.rotation.policy("wEb") == vault.rotation.policy("Web")
    blob = vault.backups.backup("web")
    vault.keys.delete("WEB")
    for name in ("web", "Web"):
        with pytest.raises(Refusal, match="deleted but recoverable"):
            vault.keys.create(name, "RSA", 2048, NewKey())
    assert vault.keys.recover("web").name == "Web"
    with pytest.raises(Refusal, match="exists already"):
        vault.backups.restore(blob)
    vault.keys.delete("web")
    vault.keys.purge("wEB")
    assert vault.keys.create("web", "RSA", 2048, NewKey()).name == "web"
