"""Linked clones of images, without a running domain. Needs no libvirt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from support import images
from support.disk_contents import CONTENT, M, decrypted, new_disk
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import Result
from virt_sse.backend import Backend
from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    ImageError,
    InvalidValueError,
    PolicyError,
    StaleImageError,
)
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.model.layers import Placement

LAYERS = ("single", "double")


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-storage-daemon", "cryptsetup")


def new_clone(backend: Backend, root: Path, layers: str = "single", image_format: str = "qcow2") -> Disk:
    """A linked clone, ``clone``, of an image ``debian:1`` with the usual content."""
    new_disk(backend, root, layers, image_format)
    backend.images.create("debian", "web")
    return backend.images.new_clone("debian", NewDisk(name="clone"))


@pytest.mark.parametrize(("layers", "image_format"), [("single", "raw"), ("double", "qcow2")])
def test_a_clone_has_keys_of_its_own_and_the_content_of_its_image(
    backend: Backend, root: Path, layers: str, image_format: str
) -> None:
    clone = new_clone(backend, root, layers, image_format)
    image = backend.images.get("debian")
    assert (clone.kind, clone.base_id, clone.source_id) == (DiskKind.DISK, image.id, image.id)
    assert (clone.set_id, clone.size, clone.format) == (image.set_id, image.size, DiskFormat.QCOW2)
    assert backend.domains.placement(clone) is Placement.STORAGE
    assert backend.host.store_reads.get("clone") == clone
    deks = {dek.passphrase for each in (clone, image) for dek in backend.host.keys.unwrap_all(each)}
    assert len(deks) == 2 * len(image.deks)
    assert decrypted(backend, clone) == CONTENT
    backend.disks.check("clone")
    (taken,) = backend.snapshots.of_disk("before", "clone").disks
    assert (taken.base_id, decrypted(backend, taken)) == (None, CONTENT)
    backend.transfer.export("clone", root / "exported", destination_format="raw")
    assert (root / "exported").read_bytes() == CONTENT
    again = backend.images.create("debian", "clone")
    assert decrypted(backend, backend.images.new_clone("debian:2", NewDisk(name="of-clone"))) == CONTENT
    assert again.base_id is None, "a chain has two images at most"


def test_each_use_of_an_images_dek_is_in_the_audit_log(backend: Backend, root: Path) -> None:
    clone = new_clone(backend, root)
    image = backend.images.get("debian")

    def uses() -> int:
        found = AuditLog.of_host(backend.host.config).records(disk=image.id, result=Result.ALLOWED)
        return sum(each.document["action"] == "unwrap" for each in found)

    before = uses()
    base = unlocked_base(backend.host, clone)
    assert base
    assert uses() == before + 1
    assert base.deks == tuple(backend.host.keys.unwrap_all(image))


def test_what_a_clone_cannot_be(backend: Backend, root: Path) -> None:
    new_clone(backend, root)
    other = backend.sets.create("other", provider="platform-managed", key="default")
    for new, error, reason in (
        (NewDisk(name="new", format=DiskFormat.RAW), InvalidValueError, "has the format qcow2"),
        (NewDisk(name="new", size=512), InvalidValueError, "more than 512"),
        (NewDisk(name="new", encryption_set="other"), PolicyError, "is in the set of its image"),
    ):
        with pytest.raises(error, match=reason):
            backend.images.new_clone("debian", new)
    with pytest.raises(PolicyError, match="'clone' is a linked clone"):
        backend.sets.move_disk("clone", other.name)
    with pytest.raises(PolicyError, match="'debian:1' has linked clones: clone"):
        backend.sets.move_disk("debian:1", other.name)
    with pytest.raises(DiskStateError, match="'web' is no image"):
        backend.images.new_clone(str(backend.disks.get("web").id), NewDisk(name="new"))
    assert [disk.name for disk in backend.disks.all()] == ["clone", "web"]


def test_an_image_with_clones_is_deleted_with_them_or_not_at_all(
    backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")  # says that no domain has the disks
    with Backend.open(root) as with_libvirt:
        _delete_with_clones(with_libvirt, root)


def _delete_with_clones(backend: Backend, root: Path) -> None:
    clone = new_clone(backend, root)
    image = backend.images.get("debian")
    backend.images.new_clone("debian", NewDisk(name="second"))
    independent = backend.images.new_disk("debian", NewDisk(name="copy"))
    with pytest.raises(DiskInUseError, match="has linked clones, unreadable without it: clone, second"):
        backend.images.delete("debian:1")
    with pytest.raises(DiskInUseError, match="needed by what is based on it: clone, second"):
        backend.disks.erase(image)  # whoever asks
    assert backend.images.get("debian").state is DiskState.READY
    backend.soft_deletion.delete("second")  # can be recovered as long as the image stays
    named = [each.name for each in backend.images.delete("debian:1", dry_run=True, force=True)]
    assert named == ["clone", "second", "debian:1"]
    assert decrypted(backend, clone) == CONTENT
    assert [each.name for each in backend.images.delete("debian:1", force=True)] == named
    assert [disk.name for disk in backend.disks.all()] == ["copy", "web"]
    assert not image.path.exists()
    assert not clone.path.exists()
    assert decrypted(backend, independent) == CONTENT


def test_an_image_on_its_way_out_gets_no_clone(backend: Backend, root: Path) -> None:
    new_clone(backend, root)
    backend.disks.erase(backend.disks.get("clone"))
    image = backend.images.get("debian")
    backend.host.store.begin_deletion(image.id)
    with pytest.raises(DiskStateError, match="is not ready"):
        backend.images.new_clone("debian", NewDisk(name="late"))
    assert [disk.name for disk in backend.disks.all()] == ["web"]
    assert images.files_below(image.path.parent) == ["debian:1.qcow2", "web.qcow2"]


@pytest.mark.parametrize("layers", LAYERS)
def test_clone_and_image_are_rotated_with_their_key(backend: Backend, root: Path, layers: str) -> None:
    clone = new_clone(backend, root, layers)
    backend.keys.rotate(clone.key)
    now = {disk.name: disk for disk in backend.host.store.all()}
    assert now["clone"].generation == now["debian:1"].generation == clone.generation + 1
    assert decrypted(backend, now["clone"]) == CONTENT


def test_the_agent_watches_the_key_version_of_the_image_too(backend: Backend, root: Path) -> None:
    """A rotation may have failed for the image alone, e.g. because its storage was away."""
    clone = new_clone(backend, root)
    image = backend.images.get("debian")
    backend.keys.rotate(clone.key)
    rotated, now = backend.images.get("debian"), backend.disks.get("clone")
    assert backend.host.store.replace(rotated, replace(rotated, deks=image.deks))
    running = RunningDomain(
        uuid=UUID(int=1),
        run=1,
        name="domain",
        uses=(DomainDisk(clone.id, None, Path("/socket"), "vda"),),
        runs=True,
        paused_for_key=False,
        usages=frozenset(),
        definition=DomainDefinition.parse("<domain/>"),
    )
    watch = KeyWatch(backend, poll_seconds=60, probe_seconds=60, changed=lambda: None)
    report = KeyStatusLookup(backend, watch).of(InventorySnapshot(1, (running,)))
    wanted = {now.deks[0].wrapped.key, image.deks[0].wrapped.key}
    assert len(wanted) == 2
    assert {watched.key for watched in report.probe_deks} == wanted
    watch.stop()


def test_a_lost_store_is_rebuilt_image_first(backend: Backend, root: Path) -> None:
    clone = new_clone(backend, root)
    image = backend.images.get("debian")
    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()
    with Backend.open(root) as again:
        with pytest.raises(DiskNotFoundError, match=f"is based on {image.id}, which is not in the store"):
            again.disks.adopt(clone.path)
        assert again.host.store.all() == []
        again.disks.adopt(image.path)
        adopted = again.disks.adopt(clone.path)
        assert (adopted.base_id, adopted.placement) == (image.id, Placement.STORAGE)
        assert decrypted(again, adopted) == CONTENT
        assert again.images.clones(again.images.get("debian")) == [adopted]


def _missing(image: Path, _other: Path) -> None:
    image.unlink()


def _other_image(image: Path, other: Path) -> None:
    shutil.copyfile(other, image)


def _longer(image: Path, _other: Path) -> None:
    os.truncate(image, image.stat().st_size + M)


def _shorter(image: Path, _other: Path) -> None:
    os.truncate(image, image.stat().st_size - 512)


def _link(image: Path, other: Path) -> None:
    image.unlink()
    image.symlink_to(other)


def _header(image: Path, _other: Path) -> None:
    with image.open("r+b") as file:
        file.seek(592 - 8)
        file.write(b"\xff" * 8)


@pytest.mark.parametrize("change", [_missing, _other_image, _longer, _shorter, _link, _header])
def test_a_changed_image_below_a_clone_is_refused(
    backend: Backend, root: Path, change: Callable[[Path, Path], None]
) -> None:
    clone = new_clone(backend, root, image_format="raw")
    image = backend.images.get("debian")
    change(image.path, backend.disks.get("web").path)
    for read in (
        lambda: unlocked_base(backend.host, clone),
        lambda: backend.disks.check("clone"),
        lambda: backend.snapshots.of_disk("before", "clone"),
        lambda: backend.transfer.export("clone", root / "exported"),
    ):
        with pytest.raises(ImageError):
            read()
    assert not (root / "exported").exists()
    backend.disks.erase(backend.disks.get("clone"))


def test_a_clone_of_a_store_that_names_another_image_is_refused(backend: Backend, root: Path) -> None:
    """Whoever can write the store can exchange a base; another set or kind does not pass."""
    clone = new_clone(backend, root)
    web = backend.disks.get("web")
    with pytest.raises(DiskStateError, match="cannot be based on disk 'web'"):
        unlocked_base(backend.host, replace(clone, base_id=web.id))
    set_id = backend.sets.create("other", provider="platform-managed", key="default").id
    with pytest.raises(DiskStateError, match="in different encryption sets"):
        unlocked_base(backend.host, replace(clone, set_id=set_id))


def test_an_older_copy_of_the_image_is_refused(backend: Backend, root: Path) -> None:
    clone = new_clone(backend, root)
    image = backend.images.get("debian")
    older = image.path.read_bytes()
    backend.keys.rotate(clone.key)
    image.path.write_bytes(older)
    with pytest.raises(StaleImageError, match="image 'debian:1', below 'clone'"):
        unlocked_base(backend.host, backend.disks.get("clone"))
