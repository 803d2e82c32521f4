"""Snapshots of disks without a running domain. Needs no libvirt."""

from __future__ import annotations

import contextlib
import os
from operator import attrgetter
from pathlib import Path

import pytest

from support import images
from support.disk_contents import CONTENT, M, decrypted, new_disk
from support.images import FORMATS, contains
from virt_sse.backend import Backend
from virt_sse.disks import creation
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    InvalidValueError,
    StaleImageError,
)
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import DiskState, NewDisk
from virt_sse.qemu import conversion, img

LAYERS = ("single", "double")


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_snapshot_is_encrypted_under_its_own_dek_and_restored_to_the_byte(
    backend: Backend, root: Path, image_format: str, layers: str
) -> None:
    disk = new_disk(backend, root, layers, image_format)
    taken = backend.snapshots.of_disk("before", "web")
    (snapshot,) = taken.disks
    assert (taken.domain, taken.pause_seconds) == (None, 0)
    assert (snapshot.kind, snapshot.source_id, snapshot.state) == (
        DiskKind.SNAPSHOT,
        disk.id,
        DiskState.READY,
    )
    assert snapshot.path == disk.path.with_name(f"before.{image_format}")
    assert (snapshot.set_id, len(snapshot.deks)) == (disk.set_id, len(disk.deks))
    assert not {entry.wrapped.ciphertext for entry in snapshot.deks} & {
        entry.wrapped.ciphertext for entry in disk.deks
    }
    assert not contains([snapshot.path], CONTENT[:40])
    backend.disks.erase(backend.disks.get("web"))
    restored = backend.snapshots.restore("before", "again")
    assert (restored.kind, restored.size, restored.format) == (DiskKind.DISK, len(CONTENT), disk.format)
    assert restored.source_id == snapshot.id
    assert decrypted(backend, restored) == CONTENT
    backend.disks.check("again")
    backend.disks.check("before")
    assert images.files_below(restored.path.parent) == [restored.path.name, snapshot.path.name]


def test_a_snapshot_is_no_disk(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    backend.snapshots.of_disk("before", "web")
    assert [disk.name for disk in backend.disks.all()] == ["web"]
    for use in (
        lambda: backend.disks.delete("before"),
        lambda: backend.disks.resize("before", 2 * M),
        lambda: backend.domains.disk_element("before"),
        lambda: backend.hotplug.attach("before", "domain"),
        lambda: backend.snapshots.of_disk("again", "before"),
    ):
        with pytest.raises(DiskStateError, match="'before' is no disk: its kind is snapshot"):
            use()
    with pytest.raises(DiskStateError, match="'web' is no snapshot: its kind is disk"):
        backend.snapshots.delete("web")
    with pytest.raises(DiskNotFoundError):
        backend.snapshots.delete("nothing")


def test_snapshots_are_rotated_with_their_set_and_keep_the_set_in_use(backend: Backend, root: Path) -> None:
    disk = new_disk(backend, root, "double")
    (snapshot,) = backend.snapshots.of_disk("before", "web").disks
    backend.keys.rotate(disk.key)
    report = backend.sets.rotate("double")
    assert not report.failed
    rotated = backend.disks.get("before")
    assert rotated.generation == snapshot.generation + 1
    assert not {entry.wrapped.key for entry in rotated.deks} & {entry.wrapped.key for entry in snapshot.deks}
    assert decrypted(backend, rotated) == CONTENT
    backend.disks.erase(backend.disks.get("web"))
    with pytest.raises(Exception, match="'before' is in disk encryption set"):
        backend.sets.delete("double")


def test_a_snapshot_is_adopted_as_a_snapshot(backend: Backend, root: Path) -> None:
    disk = new_disk(backend, root)
    (snapshot,) = backend.snapshots.of_disk("before", "web").disks
    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()
    with Backend.open(root) as again:
        adopted = again.disks.adopt(snapshot.path)
        assert (adopted.kind, adopted.name, adopted.source_id) == (DiskKind.SNAPSHOT, "before", disk.id)
        assert decrypted(again, again.snapshots.restore("before", "new")) == CONTENT


def test_deleting_a_snapshot_leaves_nothing_that_a_key_opens(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    (snapshot,) = backend.snapshots.of_disk("before", "web").disks
    restored = backend.snapshots.restore("before", "again")
    deks = backend.host.keys.unwrap_all(snapshot)
    copy = root / "copy"
    os.link(snapshot.path, copy)
    backend.snapshots.delete("before", dry_run=True)
    assert snapshot.path.exists()
    backend.snapshots.delete("before")
    assert not snapshot.path.exists()
    with pytest.raises(Exception, match="LUKS"):
        img.check_unlocks(copy, snapshot.format, deks)
    assert decrypted(backend, restored) == CONTENT


class TestRefusals:
    def test_names_and_paths_that_are_taken(self, backend: Backend, root: Path) -> None:
        disk = new_disk(backend, root)
        with pytest.raises(DiskExistsError):
            backend.snapshots.of_disk("web", "web")
        disk.path.with_name("taken.qcow2").touch()
        with pytest.raises(DiskExistsError):
            backend.snapshots.of_disk("taken", "web")
        with pytest.raises(InvalidValueError):
            backend.snapshots.of_disk("a b", "web")
        assert [each.name for each in backend.host.store.all()] == ["web"]

    def test_a_disk_that_another_process_has_open(self, backend: Backend, root: Path) -> None:
        disk = new_disk(backend, root)
        with images.KeyedImage.of(backend, disk).held(), pytest.raises(DiskInUseError):
            backend.snapshots.of_disk("before", "web")
        with backend.host.locks.hold(disk.id), pytest.raises(DiskInUseError):
            backend.snapshots.of_disk("before", "web")

    def test_a_disk_that_is_being_deleted(self, backend: Backend, root: Path) -> None:
        disk = new_disk(backend, root)
        backend.host.store.set_state(disk.id, DiskState.DELETING)
        with pytest.raises(DiskStateError, match="is deleting"):
            backend.snapshots.of_disk("before", "web")

    def test_an_older_image_is_not_made_new_by_a_snapshot(self, backend: Backend, root: Path) -> None:
        disk = new_disk(backend, root)
        old = disk.path.read_bytes()
        backend.host.freshness.begin_use(disk)
        disk.path.write_bytes(old)
        with pytest.raises(StaleImageError):
            backend.snapshots.of_disk("before", "web")

    def test_a_disk_used_during_the_copy(
        self, backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The locks of QEMU do not exclude a writer of a raw image."""
        disk = new_disk(backend, root, image_format="raw")
        copy_into = conversion.copy_into

        def use_meanwhile(*arguments: object, **options: object) -> None:
            copy_into(*arguments, **options)  # type: ignore[arg-type]
            backend.host.freshness.begin_use(disk)

        monkeypatch.setattr(conversion, "copy_into", use_meanwhile)
        with pytest.raises(DiskInUseError, match="started with disk 'web' meanwhile"):
            backend.snapshots.of_disk("before", "web")
        assert [each.name for each in backend.host.store.all()] == ["web"]
        assert images.files_below(disk.path.parent) == [disk.path.name]


PUBLISH = "image_file.publish"


class TestKilled:
    """A kill is an exception that nothing catches, and locks that end with their descriptors."""

    class Kill(BaseException):
        pass

    def killed(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str | None, *, after: int = 0
    ) -> None:
        """Take two snapshots at once; die at the end, or at the call of *name* number *after*."""
        calls = []

        def die(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) > after:
                raise self.Kill
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(creation.Creation, "settle", lambda *_: None)
            if name:
                original = attrgetter(name)(creation)
                patch.setattr(f"{creation.__name__}.{name}", die)
            patch.setattr(
                backend.live_copies,
                "of_domain",
                lambda _: [(disk.name, disk.id) for disk in backend.disks.all()],
            )
            with pytest.raises(self.Kill) if name else contextlib.nullcontext():
                backend.snapshots.of_domain("s", "domain")

    @pytest.mark.parametrize(("name", "after"), [("make", 0), ("make", 1), (PUBLISH, 0), (PUBLISH, 1)])
    def test_snapshots_taken_together_are_all_made_or_none(
        self, backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
    ) -> None:
        disks = [backend.disks.create(NewDisk(name=each, size=M)) for each in ("a", "b")]
        self.killed(backend, monkeypatch, name, after=after)
        for _ in range(2):  # a published image is erased by the second command
            Backend.open(root).close()
        with Backend.open(root) as again:
            assert again.disks.all(DiskKind.SNAPSHOT) == []
        assert images.files_below(disks[0].path.parent) == [disk.path.name for disk in disks]

    def test_complete_snapshots_are_kept(
        self, backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for each in ("a", "b"):
            backend.disks.create(NewDisk(name=each, size=M))
        self.killed(backend, monkeypatch, None)
        with Backend.open(root) as again:
            found = again.disks.all(DiskKind.SNAPSHOT)
        assert [(each.name, each.state) for each in found] == [
            ("s-a", DiskState.READY),
            ("s-b", DiskState.READY),
        ]
        assert len({each.point for each in found}) == 1
