"""Disk encryption sets with keys in a real vault, as an operator and a key's administrator use them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.customer_keys import CustomerKeys
from virt_sse.backend import Backend
from virt_sse.errors import (
    ConfigError,
    EncryptionSetInUseError,
    EncryptionSetNotFoundError,
    InvalidValueError,
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyProviderUnavailableError,
    PolicyError,
    PrincipalNotFoundError,
)
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyState
from virt_sse.model.layers import EncryptionType
from virt_sse.vault_client.permissions import Permission, Role

USE = (Permission.GET, Permission.WRAP_KEY, Permission.UNWRAP_KEY)


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        yield keys


@pytest.fixture
def host(backend: Backend, keys: CustomerKeys) -> Backend:
    """A host that may make identities in the vault."""
    path = backend.host.config.operator_credential
    path.parent.mkdir(parents=True, exist_ok=True)
    keys.administration.new_credential_file(
        path, f"host-{path.parent.stat().st_ino}", role=Role.IDENTITY_OPERATOR
    )
    return backend


@pytest.fixture
def web(host: Backend, keys: CustomerKeys) -> EncryptionSet:
    """A set whose identity may use its key."""
    made = host.sets.create("web", provider="customer-managed", key=keys.new_key())
    keys.administration.grant(str(made.identity), USE)
    return made


@pytest.fixture
def disk(host: Backend, web: EncryptionSet) -> Disk:
    return host.disks.create(NewDisk(name="one", size=1 << 20, encryption_set="web"))


def versions(host: Backend, name: str) -> set[str]:
    """The key versions that the set's disks need, wherever their DEKs lie."""
    findings = host.sets.prove(name)
    assert findings
    assert [finding.problem for finding in findings] == [None] * len(findings)
    return {str(finding.key) for finding in findings}


def test_a_set_has_an_identity_that_may_do_nothing_until_that_is_granted(
    host: Backend, keys: CustomerKeys
) -> None:
    made = host.sets.create("web", provider="customer-managed", key=keys.new_key())
    credential = host.host.config.identity(made.id)
    assert credential.stat().st_mode & 0o777 == 0o600
    assert credential.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(KeyDeniedError, match="ForbiddenByPolicy"):
        host.disks.create(NewDisk(name="one", size=1 << 20, encryption_set="web"))
    assert host.disks.all() == []
    keys.administration.grant(str(made.identity), USE)
    disk = host.disks.create(NewDisk(name="one", size=1 << 20, encryption_set="web"))
    assert disk.encryption_type is EncryptionType.CUSTOMER_KEY
    assert disk.set_id == made.id
    host.disks.check("one")


def test_a_set_is_deleted_with_its_identity(host: Backend, keys: CustomerKeys, disk: Disk) -> None:
    web = host.sets.get("web")
    with pytest.raises(EncryptionSetInUseError):
        host.sets.delete("web")
    host.disks.check("one")
    host.disks.erase(disk)
    host.sets.delete("web")
    assert not host.host.config.identity(web.id).exists()
    with pytest.raises(PrincipalNotFoundError):
        keys.administration.get_principal(str(web.identity))
    with pytest.raises(EncryptionSetNotFoundError):
        host.sets.get("web")


def test_rotation_follows_the_key_and_leaves_nothing_under_the_old_version(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk
) -> None:
    host.disks.create(NewDisk(name="two", size=1 << 20, encryption_set="web"))
    before = versions(host, "web")
    keys.rotate(web.key.name)
    assert [finding.problem for finding in host.sets.prove("web")] != [None] * 6
    report = host.sets.rotate("web")
    assert (report.rewrapped, report.current, report.failed) == (2, 0, {})
    after = versions(host, "web")
    assert len(after) == 1
    assert not after & before
    old = disk.deks[0].wrapped.key
    keys.enable(old, enabled=False)
    host.disks.check("one")
    assert host.sets.rotate("web").current == 2


def test_a_set_with_a_fixed_version_stays_under_it(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk
) -> None:
    first = disk.deks[0].wrapped.key
    host.sets.update("web", key=f"{web.key.name}/{first.version}")
    keys.rotate(web.key.name)
    assert host.sets.rotate("web").current == 1
    assert versions(host, "web") == {str(first)}
    with pytest.raises(InvalidValueError, match="fixed key version"):
        host.sets.update("web", automatic_rotation=True)
    host.sets.update("web", key=web.key.name)
    assert versions(host, "web") != {str(first)}


def test_a_set_moves_to_a_wholly_different_key(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk
) -> None:
    other = keys.new_key(size=4096)
    changed, report = host.sets.update("web", key=other)
    assert (changed.key.name, report.rewrapped, report.failed) == (other, 1, {})
    keys.delete(web.key.name)
    keys.purge(web.key.name)
    host.disks.check("one")
    assert disk.deks[0].wrapped.key.name == web.key.name


def test_a_disk_moves_into_a_set_and_to_another_and_not_out(
    host: Backend, keys: CustomerKeys, web: EncryptionSet
) -> None:
    host.disks.create(NewDisk(name="one", size=1 << 20))
    moved = host.sets.move_disk("one", "web")
    assert (moved.set_id, moved.encryption_type) == (web.id, EncryptionType.CUSTOMER_KEY)
    host.disks.check("one")
    other = host.sets.create("other", provider="customer-managed", key=keys.new_key())
    with pytest.raises(KeyDeniedError):
        host.sets.move_disk("one", "other")
    assert host.disks.get("one") == moved
    keys.administration.grant(str(other.identity), USE)
    assert host.sets.move_disk("one", "other").set_id == other.id
    host.sets.delete("web")
    host.disks.check("one")


def test_a_set_that_lost_its_rights_gives_its_disks_to_one_that_has_them(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk
) -> None:
    keys.administration.revoke(str(web.identity))
    other = host.sets.create("other", provider="customer-managed", key=web.key.name)
    keys.administration.grant(str(other.identity), USE)
    with pytest.raises(KeyDeniedError):
        host.disks.check("one")
    host.sets.move_disk("one", "other")
    host.disks.check("one")
    assert disk.set_id == web.id


def test_another_tenant_has_no_identity(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk
) -> None:
    moved = host.sets.move_to_tenant("web", "elsewhere")
    assert (moved.tenant, moved.identity) == ("elsewhere", None)
    with pytest.raises(KeyDeniedError, match="has no identity"):
        host.disks.check("one")
    assert list(host.host.keys.key_states(disk).values()) == [KeyState.DENIED]
    with pytest.raises(PrincipalNotFoundError):
        keys.administration.get_principal(str(web.identity))
    assigned = host.sets.assign_identity("web")
    with pytest.raises(InvalidValueError, match="has identity"):
        host.sets.assign_identity("web")
    keys.administration.grant(str(assigned.identity), USE)
    host.disks.check("one")


def test_a_deleted_disk_stays_under_its_set(
    host: Backend, keys: CustomerKeys, disk: Disk, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")
    with Backend.open(root) as backend:
        backend.soft_deletion.delete("one")
    assert host.sets.sizes() == {disk.set_id: 1}
    with pytest.raises(EncryptionSetInUseError, match="deleted disk 'one' is in") as caught:
        host.sets.delete("web", dry_run=True)
    assert "virt-sse disk purge" in str(caught.value.hint)
    keys.rotate(host.sets.get("web").key.name)
    assert host.sets.rotate("web").rewrapped == 1
    (version,) = {each.key for each in host.sets.prove("web")}
    assert version
    assert version != disk.deks[0].wrapped.key
    keys.enable(version, enabled=False)
    with pytest.raises(KeyDisabledError):
        host.soft_deletion.recover("one")
    assert host.disks.get("one").state is DiskState.DELETED
    keys.enable(version, enabled=True)
    host.soft_deletion.recover("one")
    host.disks.check("one")


@pytest.mark.parametrize(
    ("take", "give", "error"),
    [
        pytest.param(
            lambda keys, disk: keys.enable(disk.deks[0].wrapped.key, enabled=False),
            lambda keys, disk: keys.enable(disk.deks[0].wrapped.key, enabled=True),
            KeyDisabledError,
            id="disabled",
        ),
        pytest.param(
            lambda keys, disk: keys.delete(disk.deks[0].wrapped.key.name),
            lambda keys, disk: keys.recover(disk.deks[0].wrapped.key.name),
            KeyNotFoundError,
            id="deleted",
        ),
    ],
)
def test_rights_taken_away_can_be_granted_again(
    host: Backend,
    keys: CustomerKeys,
    disk: Disk,
    take: Callable[[CustomerKeys, Disk], None],
    give: Callable[[CustomerKeys, Disk], None],
    error: type[Exception],
) -> None:
    take(keys, disk)
    with pytest.raises(error):
        host.disks.check("one")
    give(keys, disk)
    host.disks.check("one")


def test_a_lost_store_is_rebuilt_with_a_set_that_may_use_the_key(
    host: Backend, keys: CustomerKeys, web: EncryptionSet, disk: Disk, root: Path
) -> None:
    host.close()
    for file in (root / "var/lib/virt-sse").glob("store.*"):
        file.unlink()
    with Backend.open(root) as rebuilt:
        with pytest.raises(EncryptionSetNotFoundError, match="which the store does not have"):
            rebuilt.disks.adopt(disk.path)
        again = rebuilt.sets.create("again", provider="customer-managed", key=web.key.name)
        keys.administration.grant(str(again.identity), USE)
        adopted = rebuilt.disks.adopt(disk.path, encryption_set="again")
        assert (adopted.id, adopted.set_id) == (disk.id, again.id)
        rebuilt.disks.check("one")
        assert rebuilt.sets.rotate("again").current == 1


def test_an_invalid_set_is_refused(host: Backend, keys: CustomerKeys, root: Path) -> None:
    key = keys.new_key()
    for wrong in ("web", "http://vault/keys/web", f"{key}/xyz", "https://vault/secrets/web"):
        with pytest.raises(InvalidValueError):
            host.sets.create("set", provider="customer-managed", key=wrong)
    with pytest.raises(ConfigError, match="no key provider named"):
        host.sets.create("set", provider="nobody", key=key)
    with pytest.raises(InvalidValueError, match="invalid disk name"):
        host.sets.create("a/b", provider="customer-managed", key=key)
    with pytest.raises(InvalidValueError, match="grace time"):
        host.sets.create("set", provider="customer-managed", key=key, grace_seconds=-1)
    with pytest.raises(InvalidValueError, match="cannot have the type"):
        host.sets.create(
            "set", provider="customer-managed", key=key, encryption_type=EncryptionType.PLATFORM_KEY
        )
    assert host.sets.all() == []
    assert not list(host.host.config.identity_directory.glob("*"))

    made = host.sets.create("set", provider="customer-managed", key=key, revocation=RevocationAction.NONE)
    config = root / "etc/virt-sse/config.toml"
    config.write_text('[host]\nregion = "elsewhere"\n\n[encryption-sets]\nlimit = 0\n')
    with Backend.open(root) as moved:
        keys.administration.grant(str(made.identity), USE)
        with pytest.raises(PolicyError, match="region 'default'"):
            moved.disks.create(NewDisk(name="one", size=1 << 20, encryption_set="set"))
        with pytest.raises(PolicyError, match="more are not allowed"):
            moved.sets.create("other", provider="customer-managed", key=key)
        assert len(list(moved.host.config.identity_directory.glob("*"))) == 1


def test_a_host_without_a_credential_says_who_makes_one(backend: Backend, keys: CustomerKeys) -> None:
    with pytest.raises(ConfigError, match="no credential for creating identities") as caught:
        backend.sets.create("web", provider="customer-managed", key=keys.new_key())
    assert "identity-operator" in str(caught.value.hint)


@pytest.mark.slow
def test_a_dead_vault_is_no_verdict(host: Backend, tmp_path: Path) -> None:
    with LabVault() as vault, CustomerKeys(vault, tmp_path / "others") as keys:
        host.host.config.operator_credential.unlink()
        keys.administration.new_credential_file(
            host.host.config.operator_credential, "host", role=Role.IDENTITY_OPERATOR
        )
        made = host.sets.create("web", provider="customer-managed", key=keys.new_key())
        keys.administration.grant(str(made.identity), USE)
        disk = host.disks.create(NewDisk(name="one", size=1 << 20, encryption_set="web"))
        vault.kill()
        assert list(host.host.keys.key_states(disk).values()) == [KeyState.UNREACHABLE]
        with pytest.raises(KeyProviderUnavailableError):
            host.disks.check("one")
        with pytest.raises(KeyProviderUnavailableError):
            host.sets.create("other", provider="customer-managed", key=made.key.name)
        assert [each.name for each in host.sets.all()] == ["web"]
        vault.start()
        host.disks.check("one")


def test_the_records_of_host_and_vault_match(
    host: Backend, lab_vault: LabVault, web: EncryptionSet, disk: Disk, root: Path
) -> None:
    ours = [json.loads(line) for line in (root / "var/log/virt-sse/audit.jsonl").read_text().splitlines()]
    theirs = {
        record.get("correlation"): record
        for record in map(json.loads, (lab_vault.directory / "audit.jsonl").read_text().splitlines())
    }
    (wrap,) = [record for record in ours if record.get("disk") == str(disk.id)]
    assert theirs[wrap["correlation"]]["disk"] == str(disk.id)
    assert web.identity in json.dumps(theirs[wrap["correlation"]])
