"""Restore points of disks: made, verified, restored on another host, erased. Needs no libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.customer_keys import RIGHTS, CustomerKeys
from support.disk_contents import CONTENT, decrypted, new_disk
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.disks import backup_manifest
from virt_sse.errors import DiskNotFoundError, DiskStateError, ImageError, StaleImageError
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import NewDisk
from virt_sse.qemu import img
from virt_sse.vault_client.permissions import Role


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bäckup, 1:2"
    path.mkdir()
    return path


def use(backend: Backend, keys: CustomerKeys) -> None:
    path = backend.host.config.operator_credential
    path.parent.mkdir(parents=True, exist_ok=True)
    keys.administration.new_credential_file(
        path, f"host-{path.parent.stat().st_ino}", role=Role.IDENTITY_OPERATOR
    )


def new_set(backend: Backend, keys: CustomerKeys, name: str, key: str) -> None:
    made = backend.sets.create(name, provider="customer-managed", key=key)
    keys.administration.grant(str(made.identity), RIGHTS)


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path, backend: Backend) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        use(backend, keys)
        yield keys


@pytest.mark.slow
def test_a_restore_point_is_restored_on_a_host_with_the_vault_alone(
    backend: Backend, keys: CustomerKeys, root: Path, folder: Path, tmp_path: Path
) -> None:
    key = keys.new_key()
    new_set(backend, keys, "vault", key)
    disk = new_disk(backend, root, image_format="raw")
    (point,) = backend.restore_points.create("web", folder, encryption_set="vault").disks
    assert (point.kind, point.source_id, point.key.provider) == (
        DiskKind.RESTORE_POINT,
        disk.id,
        "customer-managed",
    )
    assert images.files_below(folder) == [point.path.name, f"{point.path.name}.json"]
    assert images.mode(backup_manifest.beside(point.path)) == 0o600
    assert not images.contains([point.path], CONTENT[:40])
    keys.rotate(key)  # the version in the image goes on to unwrap
    with Backend(Config.load(tmp_path / "other")) as other:
        use(other, keys)
        new_set(other, keys, "there", key)
        with pytest.raises(StaleImageError, match="sealed by another host"):
            other.restore_points.restore(str(point.path), "new", encryption_set="there")
        restored = other.restore_points.restore(
            str(point.path),
            "new",
            encryption_set="there",
            trust=True,
            image_format=DiskFormat.QCOW2,
            place=tmp_path / "new.qcow2",
        )
        assert decrypted(other, restored) == CONTENT
        assert [each.name for each in other.disks.all()] == ["new"]


def test_a_rotation_leaves_the_checksum_and_a_changed_byte_does_not(
    backend: Backend, root: Path, folder: Path
) -> None:
    new_disk(backend, root, "double")
    (point,) = backend.restore_points.create("web", folder).disks
    backend.keys.rotate(point.key)
    assert backend.disks.get(point.name).generation > point.generation
    backend.restore_points.verify(point.name)
    assert decrypted(backend, backend.restore_points.restore(point.name, "again")) == CONTENT
    intact = point.path.read_bytes()
    for position in (4096, len(intact) // 2, len(intact) - 1):
        point.path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(ImageError):
            backend.restore_points.restore(point.name, "never")
    point.path.write_bytes(intact[:-512])
    with pytest.raises(ImageError, match="as in its manifest"):
        backend.restore_points.verify(point.name)
    point.path.write_bytes(intact)
    manifest = backup_manifest.beside(point.path)
    document = json.loads(manifest.read_text())
    for name, value in (("size", 1), ("sha256", "0" * 64), ("mac", "0" * 64), ("mac", "ä"), ("more", 1)):
        manifest.write_text(json.dumps(document | {name: value}))
        with pytest.raises(ImageError, match="manifest"):
            backend.restore_points.verify(point.name)
    manifest.unlink()
    with pytest.raises(ImageError, match="missing"):
        backend.restore_points.restore(point.name, "never")
    assert [disk.name for disk in backend.disks.all()] == ["again", "web"]


def test_a_restore_point_is_erased_alone(
    backend: Backend, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = new_disk(backend, root)
    (first,) = backend.restore_points.create("web", folder).disks
    monkeypatch.setattr("virt_sse.disks.restore_points._moment", lambda: "20300101T000000Z", raising=True)
    (second,) = backend.restore_points.create("web", folder).disks
    deks = backend.host.keys.unwrap_all(first)
    kept = folder / "kept"
    kept.hardlink_to(first.path)
    backend.restore_points.erase(str(first.path), dry_run=True)
    backend.restore_points.erase(str(first.path))
    with pytest.raises(ImageError):
        img.check_unlocks(kept, first.format, deks)
    kept.unlink()
    assert images.files_below(folder) == [second.path.name, f"{second.path.name}.json"]
    assert decrypted(backend, backend.restore_points.restore(second.name, "again")) == CONTENT
    with pytest.raises(DiskNotFoundError):
        backend.restore_points.restore(first.name, "never")
    with pytest.raises(DiskStateError, match="no restore point"):
        backend.restore_points.erase("web")
    with pytest.raises(DiskStateError, match="no disk"):
        backend.disks.delete(second.name)
    assert disk.path.exists()


def test_a_failed_backup_leaves_nothing(
    backend: Backend, root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_disk(backend, root)
    with pytest.raises(ImageError, match="is not a folder"):
        backend.restore_points.create("web", folder / "missing")
    write = backup_manifest.write

    def fail(*arguments: object, **options: object) -> None:
        write(*arguments, **options)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_manifest, "write", fail)
    with pytest.raises(ImageError, match="No space left"):
        backend.restore_points.create("web", folder)
    assert images.files_below(folder) == []
    assert [disk.name for disk in backend.host.store.all()] == ["web"]


def test_a_disk_of_a_long_name_is_backed_up(backend: Backend, folder: Path) -> None:
    backend.disks.create(NewDisk(name="x" * 80, size=512))
    (point,) = backend.restore_points.create("x" * 80, folder).disks
    backend.restore_points.verify(point.name)
