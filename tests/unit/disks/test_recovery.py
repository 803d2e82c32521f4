"""Work left by killed commands, on images that someone else has written since."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.disks.copies import new_copy
from virt_sse.disks.creation import incomplete_image
from virt_sse.domains import temp_disks
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import DiskState, NewDisk
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties
from virt_sse.qemu import image_file
from virt_sse.stages import Stages
from virt_sse.stages.record import RECORD_NAME, StageRecord

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 0])
def test_a_deletion_takes_no_length_from_the_image(root: Path, backend: Backend, length: int) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    with image_file.opened(disk.path) as descriptor:
        offset, _ = image_file.luks_area(descriptor, DiskFormat.QCOW2)
    images.rewrite_luks_pointer(disk.path, offset, length)
    backend.disks.erase(disk)
    assert backend.disks.all() == []
    assert not disk.path.exists()


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("odd"), RecursionError(), ValueError("odd")])
def test_a_disk_that_cannot_be_recovered_stops_no_other(
    root: Path,
    backend: Backend,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("bad", "good", "other"):
        disk = backend.disks.create(NewDisk(name=name, size=M))
        if name != "other":
            backend.host.store.set_state(disk.id, DiskState.DELETING)
    erase = image_file.erase

    def failing(path: Path, image_format: DiskFormat) -> None:
        if str(backend.host.store.get("bad").id) in path.resolve().name:
            raise error
        erase(path, image_format)

    monkeypatch.setattr(image_file, "erase", failing)
    with Backend.open(root) as again:
        assert {disk.name: disk.state for disk in again.disks.all()} == {
            "bad": DiskState.DELETING,
            "other": DiskState.READY,
        }
        again.disks.check("other")
    assert "disk bad stays deleting" in caplog.text
    assert "Traceback" in caplog.text
    monkeypatch.undo()
    with Backend.open(root) as again:
        assert [disk.name for disk in again.disks.all()] == ["other"]


def test_odd_remains_of_a_temporary_disk_stop_nothing(root: Path, backend: Backend) -> None:
    config = backend.host.config
    folders = [config.temp_disk_directory / str(uuid.uuid4()) for _ in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[0] / "boot").mkdir()
    (folders[1] / "boot").write_text("another boot")
    (folders[1] / "disk.raw").mkdir()
    (folders[2] / "boot").write_text("another boot")
    (config.temp_disk_directory / str(uuid.uuid4())).write_text("a file")
    with Backend.open(root):
        assert not folders[2].exists()
    temp_disks.erase_unused(config, [], before=2**40)


def test_a_temporary_disk_with_an_unexpected_failure_stops_nothing(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = backend.host.config.temp_disk_directory / str(uuid.uuid4())
    folder.mkdir(parents=True)
    (folder / "boot").write_text("another boot")

    def erase(config: Config, vm_id: uuid.UUID) -> None:
        raise OverflowError(vm_id)

    monkeypatch.setattr(temp_disks, "erase", erase)
    with Backend.open(root):
        pass
    assert "Traceback" in caplog.text


def test_a_stage_record_with_an_unexpected_failure_stops_no_other(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(backend.host.config)
    for _ in range(2):
        folder = backend.host.config.stage_directory / str(uuid.uuid4())
        folder.mkdir(parents=True)
        (folder / RECORD_NAME).write_text("{}")

    def read(*_: object) -> StageRecord | None:
        raise OverflowError

    monkeypatch.setattr(StageRecord, "read", read)
    damaged: list[Exception] = []
    assert stages.records(damaged.append) == []
    assert len(damaged) == 2


@pytest.mark.parametrize(
    "pending", ["nonsense", "[" * 100_000, '{"size": ' + "9" * 5000 + "}", '{"size": "\\ud800"}']
)
def test_a_damaged_pending_update_stops_no_other_domain(
    root: Path, backend: Backend, pending: str, caplog: pytest.LogCaptureFixture
) -> None:
    properties = VmProperties(encryption_at_host=False, size=None, temp_disk_size=None)
    for name in ("bad", "good"):
        vm = Vm(uuid.uuid4(), name, uuid.uuid4(), properties, 1, PendingUpdate(properties, {}), None)
        backend.host.store.vms.put(vm)
    with contextlib.closing(sqlite3.connect(root / "var/lib/virt-sse/store.sqlite")) as store:
        store.execute("UPDATE vms SET pending = ? WHERE name = 'bad'", (pending,))
        store.commit()
    found = {vm.name: vm.pending is not None for vm in backend.host.store.vms.all()}
    assert found == {"bad": False, "good": True}
    assert "invalid pending update" in caplog.text


def test_after_a_hostile_image_every_command_works(root: Path, virt_sse: CommandLine) -> None:
    """An image with an impossible length, its disk left ``deleting`` by an earlier version."""
    virt_sse("host", "init")
    virt_sse("disk", "create", "good", "-s", "1M")
    virt_sse("disk", "create", "bad", "-s", "1M")
    path = root / "var/lib/libvirt/images/bad.qcow2"
    with image_file.opened(path) as descriptor:
        offset, _ = image_file.luks_area(descriptor, DiskFormat.QCOW2)
    images.rewrite_luks_pointer(path, offset, 2**64 - 1)
    with contextlib.closing(sqlite3.connect(root / "var/lib/virt-sse/store.sqlite")) as store:
        store.execute("UPDATE disks SET state = 'deleting' WHERE name = 'bad'")
        store.commit()
    virt_sse("disk", "check", "good")
    assert "bad" not in virt_sse("disk", "list")


def test_a_hook_leaves_copies_of_running_domains_to_the_next_command(root: Path, backend: Backend) -> None:
    """Whether QEMU still writes to a copy is libvirt's to tell, and libvirt waits for its hook."""
    source = backend.disks.create(NewDisk(name="source", size=M))
    copy = backend.disks.create(replace(new_copy(source, "copy", DiskKind.SNAPSHOT), size=M))
    backend.host.store.set_state(copy.id, DiskState.CREATING)
    image = copy.path.rename(incomplete_image(copy))
    with Backend(backend.host.config, in_hook=True) as in_hook:
        assert in_hook.host.store.get("copy").state is DiskState.CREATING
        assert image.exists()
    with Backend(backend.host.config) as again:
        assert [disk.name for disk in again.host.store.all()] == ["source"]
        assert not image.exists()
