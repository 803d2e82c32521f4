"""The life of a disk with two layers, one under a customer's key and one under the platform's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.customer_keys import RIGHTS, CustomerKeys
from support.images import FORMATS, contains, require
from virt_sse.backend import Backend
from virt_sse.errors import (
    EncryptionSetNotFoundError,
    EnvelopeError,
    InvalidValueError,
    KeyDisabledError,
    KeyringError,
    PolicyError,
)
from virt_sse.lab.vaults import LabVault
from virt_sse.model import envelope
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import Dek
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import img
from virt_sse.vault_client.permissions import Role

DOUBLE = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
M = 1 << 20
CONTENT = b"nobody reads this without both keys. " * (M // 37) + bytes(M - M // 37 * 37)


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path, backend: Backend) -> Iterator[CustomerKeys]:
    require("qemu-img", "qemu-io", "cryptsetup")
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        path = backend.host.config.operator_credential
        path.parent.mkdir(parents=True, exist_ok=True)
        keys.administration.new_credential_file(
            path, f"host-{path.parent.stat().st_ino}", role=Role.IDENTITY_OPERATOR
        )
        yield keys


def new_set(
    backend: Backend, keys: CustomerKeys, name: str, encryption_type: EncryptionType = DOUBLE
) -> EncryptionSet:
    made = backend.sets.create(
        name, provider="customer-managed", key=keys.new_key(), encryption_type=encryption_type
    )
    keys.administration.grant(str(made.identity), RIGHTS)
    return made


@pytest.fixture
def web(backend: Backend, keys: CustomerKeys) -> EncryptionSet:
    return new_set(backend, keys, "web")


@pytest.fixture
def plain(root: Path) -> Path:
    path = root / "plain"
    path.write_bytes(CONTENT)
    return path


def imported(backend: Backend, plain: Path, image_format: str = "qcow2") -> Disk:
    kind = DiskFormat(image_format)
    return backend.transfer.import_image(
        NewDisk(name="disk", format=kind, encryption_set="web"), plain, source_format="raw"
    )


def exported(backend: Backend, root: Path) -> bytes:
    target = root / "exported"
    backend.transfer.export("disk", target, destination_format="raw")
    content = target.read_bytes()
    target.unlink()
    return content


def versions(disk: Disk) -> dict[str, str]:
    return {entry.slot: str(entry.wrapped.key) for entry in disk.deks}


def unwrapped(backend: Backend, disk: Disk) -> list[Dek]:
    return [
        backend.host.plugins.key_provider(entry.wrapped.key.provider, disk.identity_for(entry.slot)).unwrap(
            entry.wrapped, context=disk.context(entry.slot)
        )
        for entry in disk.deks
    ]


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_double_disk_is_imported_checked_exported_and_adopted(
    backend: Backend, keys: CustomerKeys, web: EncryptionSet, plain: Path, root: Path, image_format: str
) -> None:
    disk = imported(backend, plain, image_format)
    assert disk.encryption_type is DOUBLE
    assert [(entry.slot, entry.wrapped.key.provider) for entry in disk.deks] == [
        ("service", "customer-managed"),
        ("infrastructure", "platform-managed"),
    ]
    assert disk.deks[0].cipher != disk.deks[1].cipher
    assert disk.size == M
    assert not contains([disk.path], CONTENT[:37])
    backend.disks.check("disk")
    assert exported(backend, root) == CONTENT

    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()
    with Backend.open(root) as again:
        with pytest.raises(EncryptionSetNotFoundError, match="was in encryption set"):
            again.disks.adopt(disk.path)
        new_set(again, keys, "rebuilt")
        # The DEK is under the lost set's key, which the identity of any set may be granted.
        adopted = again.disks.adopt(disk.path, encryption_set="rebuilt")
        assert (adopted.id, adopted.name, adopted.size, adopted.deks) == (disk.id, "disk", M, disk.deks)
        again.disks.check("disk")
        assert exported(again, root) == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_moved_double_disk_is_adopted(
    backend: Backend, web: EncryptionSet, plain: Path, root: Path, image_format: str
) -> None:
    disk = imported(backend, plain, image_format)
    moved = disk.path.rename(disk.path.with_name("moved"))
    adopted = backend.disks.adopt(moved)
    assert (adopted.id, adopted.path, adopted.size) == (disk.id, moved, M)
    backend.disks.check("disk")
    assert exported(backend, root) == CONTENT


def test_a_double_disk_under_a_large_key_with_a_long_url_is_used_and_rotated(
    backend: Backend, keys: CustomerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = keys.client.create_rsa_key("k" * 127, size=4096)
    web = backend.sets.create(
        "web", provider="customer-managed", key=str(key.id).rpartition("/")[0], encryption_type=DOUBLE
    )
    keys.administration.grant(str(web.identity), RIGHTS)
    new = NewDisk(name="d" * 80, size=M, format=DiskFormat.RAW, encryption_set="web")
    with monkeypatch.context() as patched:
        patched.setattr(envelope, "_BODY_BYTES", 1000)
        with pytest.raises(EnvelopeError, match="header has room for 1000"):
            backend.disks.create(new)
        assert backend.disks.all() == []
        assert list(backend.host.config.disk_directory.iterdir()) == []
    disk = backend.disks.create(new)
    backend.disks.check(disk.name)
    assert backend.keys.rotate(PLATFORM_KEY)[1].failed == {}
    with monkeypatch.context() as patched:
        patched.setattr(envelope, "_BODY_BYTES", 1000)
        assert "header has room for 1000" in backend.keys.rotate(PLATFORM_KEY)[1].failed[disk.name]
    backend.disks.check(disk.name)
    backend.host.store.remove(disk.id)
    assert backend.disks.adopt(disk.path).name == disk.name


def test_a_rotation_of_one_layers_key_does_not_need_the_other_layers_key(
    backend: Backend, web: EncryptionSet, keys: CustomerKeys
) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat.RAW, encryption_set="web"))
    keys.delete(web.key.name)
    version, report = backend.keys.rotate(PLATFORM_KEY)
    assert (report.rewrapped, report.failed) == (1, {})
    service, infrastructure = backend.disks.get("disk").deks
    assert service == disk.deks[0]
    assert infrastructure.wrapped.key == version
    assert backend.keys.rewrap(PLATFORM_KEY).failed == {}
    assert "disk" in backend.sets.rotate("web").failed
    keys.recover(web.key.name)
    backend.disks.check("disk")


@pytest.mark.slow
def test_each_layer_has_the_version_of_its_own_key(
    backend: Backend, keys: CustomerKeys, web: EncryptionSet, plain: Path, root: Path
) -> None:
    before = imported(backend, plain)
    keys.rotate(web.key.name)
    assert backend.sets.rotate("web").rewrapped == 1
    customers = backend.disks.get("disk")
    assert versions(customers)["service"] != versions(before)["service"]
    assert customers.deks[1] == before.deks[1]

    _, report = backend.keys.rotate(PLATFORM_KEY)
    assert report.rewrapped >= 1
    assert report.failed == {}
    platforms = backend.disks.get("disk")
    assert versions(platforms)["infrastructure"] != versions(before)["infrastructure"]
    assert platforms.deks[0] == customers.deks[0]
    assert unwrapped(backend, platforms) == unwrapped(backend, before)
    backend.disks.check("disk")
    assert all(finding.problem is None for finding in backend.sets.prove("web") if finding.place == "store")
    assert exported(backend, root) == CONTENT


@pytest.mark.slow
def test_a_move_between_sets_changes_the_customers_layer_alone(
    backend: Backend, keys: CustomerKeys, web: EncryptionSet, plain: Path, root: Path
) -> None:
    before = imported(backend, plain)
    new_set(backend, keys, "mail")
    after = backend.sets.move_disk("disk", "mail")
    assert after.deks[0].wrapped.key.name != before.deks[0].wrapped.key.name
    assert after.deks[1] == before.deks[1]
    keys.delete(web.key.name)
    backend.disks.check("disk")
    assert exported(backend, root) == CONTENT

    new_set(backend, keys, "single", EncryptionType.CUSTOMER_KEY)
    with pytest.raises(PolicyError, match="has double encryption, set 'single' is for single"):
        backend.sets.move_disk("disk", "single")
    assert backend.disks.get("disk") == after


def test_without_either_key_nothing_opens(
    backend: Backend, keys: CustomerKeys, web: EncryptionSet, plain: Path
) -> None:
    disk = imported(backend, plain)
    keys.enable(disk.deks[0].wrapped.key, enabled=False)
    with pytest.raises(KeyDisabledError):
        backend.disks.check("disk")
    keys.enable(disk.deks[0].wrapped.key, enabled=True)
    keyring = backend.host.config.key_provider("platform-managed").directory
    keyring.rename(keyring.with_name("elsewhere"))
    with Backend.open(backend.host.config.root) as other, pytest.raises(KeyringError, match="keyring"):
        other.disks.check("disk")
    keyring.with_name("elsewhere").rename(keyring)
    backend.disks.check("disk")


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_double_disk_is_resized_to_the_exact_size(
    backend: Backend, web: EncryptionSet, plain: Path, root: Path, image_format: str
) -> None:
    disk = imported(backend, plain, image_format)
    for size in (3 * M, 200 * M, M + 512):
        backend.disks.resize("disk", size, shrink=True)
        assert backend.disks.get("disk").size == size
        assert img.usable_size_within(disk.path, disk.format, unwrapped(backend, disk)) == size
        backend.disks.check("disk")
    assert exported(backend, root)[:M] == CONTENT
    with pytest.raises(InvalidValueError, match="has 1049088 bytes, more than"):
        backend.disks.resize("disk", M)
    backend.disks.resize("disk", M, shrink=True)
    assert exported(backend, root) == CONTENT
