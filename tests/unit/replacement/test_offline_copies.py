"""Re-encryption without a running domain: libvirt is libvirt's test driver."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.hosts import host_folder
from virt_sse.backend import Backend
from virt_sse.errors import DiskExistsError, DiskStateError, ImageError, PolicyError
from virt_sse.host.setup import initialise
from virt_sse.model.ciphers import AES_256_CBC
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.model.replacements import ReplacementState
from virt_sse.replacement import reencryption
from virt_sse.replacement.offline import no_bars
from virt_sse.replacement.reencryption import Reencryption

M = 1 << 20
CONTENT = b"what the guest has written".ljust(M + 512, b".")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    images.require("qemu-img", "qemu-io", "cryptsetup", "bwrap")
    root = host_folder(tmp_path / "root", monkeypatch)
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")
    with Backend.open(root) as opened:
        initialise(opened.host)
        yield opened


@pytest.fixture
def disk(backend: Backend, tmp_path: Path) -> Disk:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    return backend.transfer.import_image(NewDisk(name="web"), source, source_format="raw")


def content(backend: Backend, disk: Disk, folder: Path) -> bytes:
    plain = folder / "plain"
    plain.unlink(missing_ok=True)
    backend.transfer.export(disk.name, plain, destination_format="raw")
    return plain.read_bytes()


def only(backend: Backend) -> Disk:
    """The only disk; nothing of a copy is left."""
    (found,) = backend.disks.all()
    assert found.state is DiskState.READY
    assert backend.host.store.replacements.all() == []
    assert list(found.path.parent.iterdir()) == [found.path]
    return found


def test_cipher_format_and_set_can_change(backend: Backend, disk: Disk, tmp_path: Path) -> None:
    change = Reencryption(cipher=AES_256_CBC, format=DiskFormat.RAW)
    done = backend.reencryption.reencrypt("web", change, no_bars)
    assert done.paused_seconds is None
    after = only(backend)
    assert after == done.disk
    assert (after.name, after.size, after.format) == ("web", disk.size, DiskFormat.RAW)
    assert after.guest_serial == disk.guest_serial
    assert [str(entry.cipher) for entry in after.deks] == ["aes-256-cbc-essiv:sha256"]
    assert content(backend, after, tmp_path) == CONTENT
    backend.disks.check("web")
    backend.host.store.remove(after.id)
    adopted = backend.disks.adopt(after.path)
    known = {name: getattr(after, name) for name in ("serial", "origin_id", "source_id")}  # by the store
    assert dataclasses.replace(adopted, **known) == after


def test_the_path_stays_if_the_format_stays(backend: Backend, disk: Disk, tmp_path: Path) -> None:
    backend.reencryption.reencrypt("web", Reencryption(), no_bars)
    after = only(backend)
    assert after.path == disk.path
    assert after.id != disk.id
    assert content(backend, after, tmp_path) == CONTENT


def test_several_disks_at_a_time(backend: Backend, disk: Disk) -> None:
    other = backend.disks.create(NewDisk(name="other", size=M))
    seen: list[float] = []
    failed = backend.reencryption.reencrypt_all(
        [disk, other, dataclasses.replace(other, name="gone")], jobs=2, max_rate=None, progress=seen.append
    )
    assert list(failed) == ["gone"]
    assert seen[-1] == 1.0
    assert {disk.id, other.id}.isdisjoint(each.id for each in backend.disks.all())


def test_a_failure_leaves_the_disk_as_before(
    backend: Backend, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DiskExistsError):
        backend.reencryption.reencrypt("web", Reencryption(path=disk.path), no_bars)
    with pytest.raises(PolicyError, match="same cipher"):
        backend.reencryption.reencrypt(
            "web",
            Reencryption(
                encryption_set=_double(backend), cipher=AES_256_CBC, infrastructure_cipher=AES_256_CBC
            ),
            no_bars,
        )
    with monkeypatch.context() as patch:
        patch.setattr(reencryption, "_identity", lambda _path: object())
        with pytest.raises(ImageError, match="was changed during the copy"):
            backend.reencryption.reencrypt("web", Reencryption(), no_bars)
    assert only(backend) == disk
    assert content(backend, disk, tmp_path) == CONTENT


def _double(backend: Backend) -> str:
    kind = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
    return backend.sets.create(
        "double", provider="platform-managed", key="default", encryption_type=kind
    ).name


def test_a_disk_that_is_copied_is_refused_to_all_others(backend: Backend, disk: Disk) -> None:
    backend.reencryption.start_detached("web", Reencryption())
    with pytest.raises(DiskStateError, match="is copying"):
        backend.reencryption.reencrypt("web", Reencryption(), no_bars)
    with pytest.raises(DiskStateError, match="is copying"):
        backend.disks.resize("web", 8 * M)
    with pytest.raises(DiskStateError, match="is copying"):
        backend.disks.erase(disk)
    with Backend.open(backend.host.config.root) as second:  # the agent's copies stay
        assert len(second.disks.all()) == 2
        assert [copy.state for copy in second.host.store.replacements.all()] == [ReplacementState.COPYING]
        assert second.reencryption.cancel("web") == disk
    assert only(backend) == disk
    with pytest.raises(DiskStateError, match="not being re-encrypted"):
        backend.reencryption.cancel("web")
