"""Incremental snapshots and restore points of disks without a running domain. Needs no libvirt."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from support.customer_keys import RIGHTS, CustomerKeys
from support.disk_contents import CONTENT, decrypted, new_disk
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.disks import backup_manifest, copies, creation
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    ImageError,
    StaleImageError,
    VirtSseError,
)
from virt_sse.keys import copy_chains
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.qemu import conversion
from virt_sse.qemu.difference import CLUSTER
from virt_sse.store.tables import disks
from virt_sse.system.confinement import BoundFile
from virt_sse.vault_client.permissions import Role

CHANGED = CONTENT[:CLUSTER] + bytes(3 * CLUSTER) + CONTENT[4 * CLUSTER : -100] + b"x" * 100


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "qemu-storage-daemon", "cryptsetup")


def rewrite(backend: Backend, disk: Disk, content: bytes) -> None:
    """Give a disk other content, of the same length, without a domain."""
    plain = backend.host.config.state_directory / "plain"
    plain.write_bytes(content)
    descriptor = os.open(plain, os.O_RDONLY)
    node = conversion.node_without_backing(plain, descriptor, "raw")
    source = conversion.CopySource(node, (BoundFile(plain, descriptor),))
    deks = backend.host.keys.unwrap_all(disk)
    conversion.copy_into(source, disk.path, disk.format, deks, lambda _: None)
    os.close(descriptor)
    plain.unlink()


def taken(backend: Backend, name: str) -> Disk:
    return backend.snapshots.of_disk(name, "web", is_incremental=True).disks[0]


def restored(backend: Backend, snapshot: str) -> bytes:
    disk = backend.snapshots.restore(snapshot, "restored")
    content = decrypted(backend, disk)
    backend.disks.erase(disk)
    return content


@pytest.mark.slow
@pytest.mark.parametrize(("image_format", "layers"), [("qcow2", "single"), ("raw", "double")])
def test_a_chain_is_restored_to_the_byte(
    backend: Backend, root: Path, image_format: str, layers: str
) -> None:
    disk = new_disk(backend, root, layers, image_format)
    first = backend.snapshots.of_disk("s1", "web", is_incremental=True)
    assert first.full == {"s1": "there is no snapshot of disk 'web' to be based on"}
    rewrite(backend, disk, CHANGED)
    second = backend.snapshots.of_disk("s2", "web", is_incremental=True)
    (increment,) = second.increments.values()
    assert (increment.base.name, increment.by_bitmap) == ("s1", False)
    assert increment.changed_bytes == 3 * CLUSTER + 512
    (s2,) = second.disks
    assert (s2.format, s2.path.name) == (DiskFormat.QCOW2, "s2.qcow2")
    rewrite(backend, disk, CONTENT)
    s3, s4 = taken(backend, "s3"), taken(backend, "s4")
    assert s4.base_id == s3.id
    wrapped = [entry.wrapped.ciphertext for each in (disk, s2, s3, s4) for entry in each.deks]
    assert len(set(wrapped)) == len(wrapped)
    assert not images.contains([s2.path, s3.path], CONTENT[:40], b"x" * 100)
    backend.disks.erase(disk)
    backend.keys.rotate(disk.key)
    for name, content in (("s2", CHANGED), ("s3", CONTENT), ("s4", CONTENT)):
        backend.disks.check(name)
        assert restored(backend, name) == content
    assert decrypted(backend, backend.images.create("image", "s3")) == CONTENT
    backend.transfer.export("s2", root / "export", destination_format="raw")
    assert (root / "export").read_bytes() == CHANGED


def test_what_an_incremental_snapshot_needs_is_not_deleted(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    for name in ("s1", "s2", "s3"):
        taken(backend, name)
    with pytest.raises(DiskInUseError, match="'s1' is needed by what is based on it: s2, s3"):
        backend.snapshots.delete("s1", dry_run=True)
    with pytest.raises(DiskInUseError, match="needed by what is based on it: s3"):
        backend.snapshots.delete("s2")
    for name in ("s3", "s2", "s1"):
        backend.snapshots.delete(name)
    assert [each.name for each in backend.host.store.all()] == ["web"]


def test_a_chain_is_adopted_from_its_images(backend: Backend, root: Path) -> None:
    disk = new_disk(backend, root)
    s1 = taken(backend, "s1")
    rewrite(backend, disk, CHANGED)
    s2 = taken(backend, "s2")
    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()
    with Backend.open(root) as again:
        assert again.disks.adopt(s2.path).base_id == s1.id
        with pytest.raises(DiskNotFoundError, match=f"'s2' is based on {s1.id}, which is not in the store"):
            again.snapshots.restore("s2", "new")
        again.disks.adopt(s1.path)
        assert restored(again, "s2") == CHANGED


def set_base(backend: Backend, copy: Disk, base: Disk | None) -> None:
    """Change the store as a fault or an attacker might."""
    with backend.host.store._engine.begin() as connection:
        changed = disks.update().where(disks.c.id == copy.id).values(base_id=base.id if base else None)
        connection.execute(changed)


class TestHostileChains:
    """Each is refused before a tool opens any image."""

    @pytest.fixture
    def chain(self, backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
        new_disk(backend, root, image_format="raw")
        made = [taken(backend, "s1"), taken(backend, "s2"), taken(backend, "s3")]

        def opened(*_: object, **__: object) -> None:
            pytest.fail("a tool opened the chain")

        monkeypatch.setattr(conversion, "run_with_progress", opened)
        return made

    def refused(self, backend: Backend, error: type[VirtSseError], match: str) -> None:
        with pytest.raises(error, match=match):
            backend.snapshots.restore("s3", "never")
        assert [each.name for each in backend.disks.all()] == ["web"]

    def test_loops_and_missing_links(self, backend: Backend, chain: list[Disk]) -> None:
        s1, s2, s3 = chain
        set_base(backend, s1, s3)
        self.refused(backend, DiskStateError, "the chain of snapshot 's3' is a loop, at 's1'")
        set_base(backend, s1, s1)
        self.refused(backend, DiskStateError, "is a loop")
        set_base(backend, s1, backend.disks.get("web"))
        self.refused(backend, DiskStateError, "snapshot 's1' cannot be based on disk 'web'")
        set_base(backend, s1, None)
        backend.host.store.remove(s2.id)
        self.refused(backend, DiskNotFoundError, "'s3' is based on .*, which is not in the store")

    def test_too_many_links(
        self, backend: Backend, chain: list[Disk], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(copy_chains, "LONGEST", 2)
        self.refused(backend, DiskStateError, "more than 2 links")

    def test_files_that_are_not_the_links(self, backend: Backend, chain: list[Disk]) -> None:
        s1, s2, s3 = chain
        intact = {each: each.path.read_bytes() for each in chain}
        s2.path.unlink()
        self.refused(backend, ImageError, "'s2', below 's3': .* is missing")
        s2.path.write_bytes(intact[s3])
        self.refused(backend, ImageError, "is the image of another disk")
        s2.path.write_bytes(b"foreign" * 1000)
        self.refused(backend, ImageError, "below 's3'")
        s2.path.unlink()
        s2.path.symlink_to("/dev/zero")
        self.refused(backend, ImageError, "not a regular file")
        s2.path.unlink()
        s2.path.write_bytes(intact[s2])
        s1.path.write_bytes(intact[s1][:-CLUSTER])
        self.refused(backend, StaleImageError, "'s1', below 's3': .* instead of")
        s1.path.write_bytes(intact[s1])
        name = bytearray(intact[s2])
        name[8:20] = (4096).to_bytes(8, "big") + (11).to_bytes(4, "big")
        name[4096:4107] = b"/etc/shadow"
        s2.path.write_bytes(name)
        self.refused(backend, ImageError, "names a backing file")

    def test_an_older_image_of_a_link(self, backend: Backend, chain: list[Disk]) -> None:
        _, s2, _ = chain
        old = s2.path.read_bytes()
        backend.keys.rotate(s2.key)
        s2.path.write_bytes(old)
        self.refused(backend, StaleImageError, "'s2', below 's3': .* an older copy of the image")


def test_a_copy_that_cannot_be_read_is_not_built_upon(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    taken(backend, "s1").path.unlink()
    made = backend.snapshots.of_disk("s2", "web", is_incremental=True)
    assert "snapshot 's1' cannot be read" in made.full["s2"]
    assert made.disks[0].base_id is None
    assert restored(backend, "s2") == CONTENT


def test_a_killed_comparison_leaves_nothing(
    backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def die(*_: object) -> None:
        raise Kill

    disk, s1 = new_disk(backend, root), taken(backend, "s1")
    with monkeypatch.context() as patch:
        patch.setattr(creation.Creation, "settle", lambda *_: None)
        patch.setattr(copies, "write_difference", die)
        with pytest.raises(Kill):
            taken(backend, "s2")
    (unfinished,) = backend.host.store.unfinished()
    creation.difference_image(unfinished).touch()
    with Backend.open(root) as again:
        assert again.host.store.unfinished() == []
        assert images.files_below(disk.path.parent) == [s1.path.name, disk.path.name]
        assert taken(again, "s2").base_id == s1.id


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Names of restore points made within a second."""
    numbers = iter(range(100))
    moment = lambda: f"2030010{next(numbers)}T000000Z"  # noqa: E731
    monkeypatch.setattr("virt_sse.disks.restore_points._moment", moment)
    return moment


@pytest.mark.slow
def test_a_chain_of_backups_needs_the_vault_and_the_folder_alone(
    backend: Backend, lab_vault: LabVault, root: Path, tmp_path: Path, moments: object
) -> None:
    folder = tmp_path / "bäckup, 1:2"
    folder.mkdir()
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        for each in (backend.host.config, Config.load(tmp_path / "other")):
            each.operator_credential.parent.mkdir(parents=True, exist_ok=True)
            keys.administration.new_credential_file(
                each.operator_credential,
                f"host-{each.operator_credential.parent.stat().st_ino}",
                role=Role.IDENTITY_OPERATOR,
            )
        key = keys.new_key()
        made = backend.sets.create("vault", provider="customer-managed", key=key)
        keys.administration.grant(str(made.identity), RIGHTS)
        disk = new_disk(backend, root)
        points = []
        for content in (CONTENT, CHANGED, CONTENT):
            rewrite(backend, disk, content)
            point = backend.restore_points.create("web", folder, encryption_set="vault", is_incremental=True)
            points.append(point.disks[0])
        assert [each.base_id for each in points] == [None, points[0].id, points[1].id]
        keys.rotate(key)
        assert not backend.sets.rotate("vault").failed
        backend.restore_points.verify(points[2].name)
        with pytest.raises(DiskInUseError, match="is needed by what is based on it"):
            backend.restore_points.erase(points[0].name)
        with Backend(Config.load(tmp_path / "other")) as other:
            theirs = other.sets.create("there", provider="customer-managed", key=key)
            keys.administration.grant(str(theirs.identity), RIGHTS)
            place = tmp_path / "new.qcow2"
            with pytest.raises(StaleImageError, match="sealed by another host"):
                other.restore_points.restore(str(points[1].path), "new", encryption_set="there")
            new = other.restore_points.restore(
                str(points[1].path), "new", encryption_set="there", trust=True, place=place
            )
            assert decrypted(other, new) == CHANGED


def test_every_link_of_a_backup_is_verified(
    backend: Backend, root: Path, tmp_path: Path, moments: object
) -> None:
    disk, folder = new_disk(backend, root), tmp_path / "backup"
    folder.mkdir()
    points = []
    for content in (CONTENT, CHANGED, CONTENT):
        rewrite(backend, disk, content)
        points += backend.restore_points.create("web", folder, is_incremental=True).disks
    first, second, third = points
    manifests = [backup_manifest.beside(each.path) for each in points]
    texts = [each.read_text() for each in manifests]
    intact = second.path.read_bytes()
    second.path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(ImageError, match="is damaged"):
        backend.restore_points.verify(third.name)
    second.path.write_bytes(intact)
    other = tmp_path / "other"
    other.mkdir()
    (elsewhere,) = backend.restore_points.create("web", other, is_incremental=True).disks
    assert elsewhere.base_id is None
    dek = backend.host.keys.unwrap_slot(second, second.deks[0].slot)
    stranger = backend.host.keys.unwrap_slot(elsewhere, elsewhere.deks[0].slot)
    below = backup_manifest.read(elsewhere, stranger)
    manifests[1].unlink()
    backup_manifest.write(second, second.path, dek, base=below)
    with pytest.raises(ImageError, match="name different restore points below"):
        backend.restore_points.verify(third.name)
    manifests[1].write_text(texts[1])
    backend.restore_points.verify(third.name)
    for name in ("../x", "", ".."):
        manifests[2].write_text(texts[2].replace(second.path.name, name))
        with pytest.raises(ImageError, match="names an invalid file"):
            backup_manifest.chain(third.path)
    manifests[2].write_text(texts[2].replace(second.path.name, third.path.name))
    with pytest.raises(ImageError, match=r"form a loop|names an invalid"):
        backup_manifest.chain(third.path)
    manifests[2].write_text(texts[2])
    first.path.rename(tmp_path / "away")
    with pytest.raises(ImageError, match=r"which .* is based on, is missing"):
        backup_manifest.chain(third.path)
