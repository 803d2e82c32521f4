"""Restoration of disks in place: libvirt is libvirt's test driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.disk_contents import CONTENT, decrypted, new_disk
from support.hosts import host_folder
from virt_sse.backend import Backend
from virt_sse.errors import DiskInUseError, DiskStateError, ImageError
from virt_sse.host.setup import initialise
from virt_sse.model.disks import Disk, DiskState
from virt_sse.replacement import restoration
from virt_sse.replacement.offline import no_bars
from virt_sse.replacement.reencryption import Reencryption
from virt_sse.replacement.settlement import Settlement


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    images.require("qemu-img", "qemu-io", "cryptsetup", "bwrap")
    folder = host_folder(tmp_path / "root", monkeypatch)
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")
    return folder


@pytest.fixture
def backend(root: Path) -> Iterator[Backend]:
    with Backend.open(root) as opened:
        initialise(opened.host)
        yield opened


def changed(backend: Backend, disk: Disk) -> Disk:
    """The disk after a write at its beginning, and after a resize."""
    images.KeyedImage.of(backend, disk).write(0, 4096, 0x41)
    return backend.disks.resize(disk.name, disk.size + 512)


def only(backend: Backend) -> Disk:
    """The only disk; nothing of a restoration is left."""
    (disk,) = backend.disks.all()
    assert disk.state is DiskState.READY
    assert backend.host.store.replacements.all() == []
    files = {disk.path, *(each.path for each in backend.host.store.all())}
    assert set(disk.path.parent.iterdir()) == files
    return disk


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_the_content_comes_back_and_the_disk_keeps_its_name(
    backend: Backend, root: Path, image_format: str
) -> None:
    disk = new_disk(backend, root, image_format=image_format)
    backend.snapshots.of_disk("s1", "web")
    disk = changed(backend, disk)
    backend.restoration.restore("s1", "web", no_bars, dry_run=True)
    assert decrypted(backend, disk)[:4096] == b"\x41" * 4096
    after = backend.restoration.restore("s1", "web", no_bars)
    assert after == only(backend)
    assert (after.name, after.path, after.format, after.size) == ("web", disk.path, disk.format, len(CONTENT))
    assert (after.sku, after.set_id, after.guest_serial) == (disk.sku, disk.set_id, disk.guest_serial)
    assert decrypted(backend, after) == CONTENT
    backend.disks.check("web")
    again = backend.restoration.restore("s1", "web", no_bars)
    assert decrypted(backend, again) == CONTENT
    made = backend.snapshots.of_disk("s2", "web", is_incremental=True)
    assert [each.base.name for each in made.increments.values()] == ["s1"]
    assert [each.changed_bytes for each in made.increments.values()] == [0]


def test_refusals_change_nothing(backend: Backend, root: Path) -> None:
    disk = new_disk(backend, root)
    (snapshot,) = backend.snapshots.of_disk("s1", "web").disks
    backend.snapshots.restore("s1", "other")
    with pytest.raises(DiskStateError, match="'s1' is no snapshot of disk 'other'"):
        backend.restoration.restore("s1", "other", no_bars)
    with pytest.raises(DiskStateError, match="is no snapshot"):
        backend.restoration.restore("other", "web", no_bars)
    with pytest.raises(DiskStateError, match="'s1' is no disk"):
        backend.reencryption.reencrypt("s1", Reencryption(), no_bars)
    with images.KeyedImage.of(backend, disk).held(), pytest.raises(DiskInUseError):
        backend.restoration.restore("s1", "web", no_bars)
    snapshot.path.unlink()
    with pytest.raises(ImageError, match="missing"):
        backend.restoration.restore("s1", "web", no_bars)
    assert backend.disks.get("web") == disk


class Kill(BaseException):
    """Nothing catches a kill."""


@pytest.mark.parametrize("moment", ["begin", "create", "copy_offline", "take_over", "finish"])
def test_a_kill_leaves_the_disk_before_or_after(
    backend: Backend, root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    disk = changed(backend, new_disk(backend, root))
    before = decrypted(backend, disk)
    backend.snapshots.of_disk("s1", "web")
    images.KeyedImage.of(backend, disk).write(0, 4096, 0x42)

    def die(*_: object, **__: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(Settlement, "settle", lambda *_, **__: None)
        if moment == "begin":
            patch.setattr(backend.disks, "create", die)
        elif moment == "create":
            patch.setattr(backend.host.store.replacements, "reserve", die)
        elif moment == "copy_offline":
            patch.setattr(restoration, "copy_offline", die)
        elif moment == "take_over":
            patch.setattr(backend.host.store.replacements, "take_over", die)
        else:
            patch.setattr(Settlement, "finish", die)
        with pytest.raises(Kill):
            backend.restoration.restore("s1", "web", no_bars)
    with Backend.open(root) as again:
        found = decrypted(again, only(again))
        assert found[4096:] == before[4096:]
        assert found[:4096] == (b"\x41" if moment == "finish" else b"\x42") * 4096
        assert decrypted(again, again.restoration.restore("s1", "web", no_bars)) == before
