"""Images: their versions, and the disks made of them. Needs no libvirt."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.customer_keys import RIGHTS, CustomerKeys
from support.disk_contents import CONTENT, M, decrypted, new_disk
from virt_sse.backend import Backend
from virt_sse.errors import DiskExistsError, DiskNotFoundError, DiskStateError, InvalidValueError, PolicyError
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import NewDisk
from virt_sse.vault_client.permissions import Role


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.slow
def test_a_disk_is_made_of_the_newest_version_or_of_a_named_version(backend: Backend, root: Path) -> None:
    disk = new_disk(backend, root, "double")
    first = backend.images.create("debian", "web")
    assert (first.name, first.kind, first.set_id) == ("debian:1", DiskKind.IMAGE, disk.set_id)
    backend.snapshots.of_disk("before", "web")
    empty = backend.disks.create(NewDisk(name="empty", size=M, encryption_set="double"))
    assert backend.images.create("debian", "empty", version=9).source_id == empty.id
    assert backend.images.create("debian", "before", image_format=DiskFormat.RAW).name == "debian:10"
    assert [image.name for image in backend.images.versions("debian")] == [
        "debian:1",
        "debian:9",
        "debian:10",
    ]
    newest = backend.images.new_disk("debian", NewDisk(name="newest", format=DiskFormat.QCOW2))
    assert decrypted(backend, newest) == CONTENT
    assert (newest.kind, newest.set_id, newest.format) == (DiskKind.DISK, disk.set_id, DiskFormat.QCOW2)
    assert decrypted(backend, backend.images.new_disk("debian:9", NewDisk(name="nine"))) == bytes(M)
    larger = backend.images.new_disk("debian:1", NewDisk(name="larger", size=2 * M))
    assert decrypted(backend, larger) == CONTENT + bytes(2 * M - len(CONTENT))
    with pytest.raises(InvalidValueError, match="more than 512"):
        backend.images.new_disk("debian", NewDisk(name="small", size=512))
    backend.images.delete("debian:10")
    assert decrypted(backend, newest) == CONTENT
    assert backend.images.get("debian").name == "debian:9"


@pytest.mark.parametrize("foreign", ["raw", "vmdk", "vpc", "vhdx", "qcow2"])
def test_a_foreign_image_becomes_an_encrypted_image(backend: Backend, root: Path, foreign: str) -> None:
    """Also of a size that is no multiple of 1 MiB, and at a path with every awkward character."""
    plain, source = root / "plain", root / "ünï cöde, a:b=c"
    plain.write_bytes(CONTENT)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", foreign, plain, source], check=True)
    image = backend.images.import_image("debian", source, source_format=foreign)
    assert not images.contains([image.path], CONTENT[:40])
    found = decrypted(backend, image)
    assert found.startswith(CONTENT)
    assert not found[len(CONTENT) :].strip(b"\0")  # of some formats, the size is rounded up


def test_names_of_images(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    backend.images.create("web", "web", version=3)  # the name of a disk
    with pytest.raises(DiskExistsError):
        backend.images.create("web", "web", version=3)
    for name in ("", "a:b", "a b", "x" * 71):
        with pytest.raises(InvalidValueError, match="invalid image name"):
            backend.images.create(name, "web")
    with pytest.raises(InvalidValueError, match="has versions"):
        backend.images.delete("web")
    with pytest.raises(DiskNotFoundError, match="no image"):
        backend.images.get("other")
    with pytest.raises(DiskStateError, match="'web' is no image: its kind is disk"):
        backend.images.get(str(backend.disks.get("web").id))
    assert [disk.name for disk in backend.disks.all()] == ["web"]


def test_an_image_is_adopted_with_its_version(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    image = backend.images.create("debian", "web", version=7)
    backend.host.store.remove(image.id)
    assert backend.disks.adopt(image.path).name == "debian:7"
    assert backend.images.get("debian").id == image.id


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path, backend: Backend) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        path = backend.host.config.operator_credential
        path.parent.mkdir(parents=True, exist_ok=True)
        keys.administration.new_credential_file(
            path, f"host-{path.parent.stat().st_ino}", role=Role.IDENTITY_OPERATOR
        )
        for name in ("one", "two"):
            made = backend.sets.create(name, provider="customer-managed", key=keys.new_key())
            keys.administration.grant(str(made.identity), RIGHTS)
        yield keys


@pytest.mark.usefixtures("keys")
def test_copies_stay_under_the_customers_key(backend: Backend, root: Path) -> None:
    new_disk(backend, root)
    ours = backend.images.new_disk(
        backend.images.create("plain", "web").name, NewDisk(name="ours", encryption_set="one")
    )
    (snapshot,) = backend.snapshots.of_disk("before", "ours").disks
    image = backend.images.create("debian", "before")
    assert ours.key == snapshot.key == image.key
    refused = "must be under the key of"
    with pytest.raises(PolicyError, match=f"disk 'new' {refused} snapshot 'before'"):
        backend.snapshots.restore("before", "new", encryption_set="two")
    with pytest.raises(PolicyError, match=f"image 'debian:2' {refused} disk 'ours'"):
        backend.images.create("debian", "ours", encryption_set="two")
    with pytest.raises(PolicyError, match=f"disk 'new' {refused} image 'debian:1'"):
        backend.images.new_disk("debian", NewDisk(name="new", encryption_set="two"))
    assert decrypted(backend, backend.images.new_disk("debian", NewDisk(name="new"))) == CONTENT
