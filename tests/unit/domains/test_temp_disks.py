"""Temporary disks, without a domain."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains import temp_disks
from virt_sse.errors import DiskInUseError, ImageError
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import image_file, img

pytestmark = pytest.mark.usefixtures("as_root")  # the disks are given to QEMU's user

ID = uuid.UUID("b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11")
QEMU = User(64055, 108)


@pytest.fixture
def config(backend: Backend) -> Iterator[Config]:
    yield backend.host.config
    assert all(file.is_dir() for file in backend.host.config.disk_directory.iterdir())


def make(backend: Backend, vm_id: uuid.UUID = ID) -> Dek:
    layer, wrapping = backend.host.plugins.host_layer(), backend.host.keys
    return temp_disks.create(backend.host.config, layer, wrapping, vm_id, "web", 1 << 20, QEMU)


def test_a_temporary_disk_is_a_luks_image_for_qemu_alone(backend: Backend, config: Config) -> None:
    dek = make(backend)
    path = temp_disks.image(config, ID)
    img.check_unlocks(path, DiskFormat.RAW, [dek])
    with image_file.opened(path) as descriptor:
        assert image_file.usable_size(descriptor, DiskFormat.RAW) == 1 << 20
    assert temp_disks.unlock(config, backend.host.keys, ID, "web") == dek
    folder = path.parent.stat()
    assert (folder.st_mode & 0o777, folder.st_uid, folder.st_gid) == (0o710, 0, QEMU.gid)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ImageError, match="temporary disk of a VM"):
        backend.disks.adopt(path)
    assert make(backend) != dek, "a new start, a new key"
    temp_disks.erase(config, ID)
    assert not path.parent.exists()
    temp_disks.erase(config, ID)


def test_erasing_leaves_nothing_to_open(backend: Backend, config: Config) -> None:
    dek = make(backend)
    path = temp_disks.image(config, ID)
    kept = path.parents[2] / "kept"
    os.link(path, kept)
    temp_disks.erase(config, ID)
    with pytest.raises(ImageError):
        img.check_unlocks(kept, DiskFormat.RAW, [dek])
    kept.unlink()


def test_a_temporary_disk_that_qemu_has_open_is_not_erased(backend: Backend, config: Config) -> None:
    make(backend)
    path = temp_disks.image(config, ID)
    os.utime(path.parent, (1, 1))
    command = [
        "qemu-io",
        "-c",
        f"open -o driver=raw,file.driver=file,file.filename={path}",
        "-c",
        "sleep 1000",
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as reader:
        wait_until(lambda: _is_open(path), "the reader has opened the image", seconds=10)
        with pytest.raises(DiskInUseError):
            temp_disks.erase(config, ID)
        temp_disks.erase_unused(config, [], before=time.time())
        assert path.exists()
        reader.wait()
    temp_disks.erase_unused(config, [], before=time.time())
    assert not path.exists()


def _is_open(path: Path) -> bool:
    try:
        image_file.refuse_if_open(path)
    except DiskInUseError:
        return True
    return False


def test_only_unused_temporary_disks_are_erased(backend: Backend, config: Config) -> None:
    other = uuid.uuid4()
    make(backend)
    make(backend, other)
    temp_disks.erase_unused(config, [ID, other], before=time.time() + 9)
    temp_disks.erase_unused(config, [], before=time.time() - 9)
    temp_disks.erase_of_other_boots(config)
    assert len(list(config.temp_disk_directory.iterdir())) == 2
    temp_disks.erase_unused(config, [ID], before=time.time() + 9)
    assert [path.name for path in config.temp_disk_directory.iterdir()] == [str(ID)]
    (config.temp_disk_directory / str(ID) / "boot").write_text("another boot\n")
    with Backend(config):
        assert list(config.temp_disk_directory.iterdir()) == []
    make(backend)
    temp_disks.image(config, ID).write_bytes(b"torn")  # by a kill while it was made
    temp_disks.erase(config, ID)
