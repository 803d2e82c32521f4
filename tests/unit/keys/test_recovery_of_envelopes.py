"""A command killed between the store and the image of a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from virt_sse.backend import Backend
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.envelope import Envelope
from virt_sse.qemu import envelope_slots, image_file

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


def carried(disk: Disk) -> Envelope:
    with image_file.opened(disk.path) as descriptor:
        return envelope_slots.read(descriptor, disk.format)


def marks(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "var/lib/virt-sse/pending-envelopes").glob("*"))


def interrupt(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Rotate, and end at the moment when the store is newer than the image."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(envelope_slots, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.keys.rotate(PLATFORM_KEY)


def test_the_next_command_writes_the_envelope(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backend.disks.create(NewDisk(name="disk", size=M))
    interrupt(monkeypatch, backend)
    assert marks(root) == [str(made.id)]
    assert carried(made).generation == 1
    with Backend.open(root) as again:
        disk = again.disks.get("disk")
        assert disk.generation == 2
        assert carried(disk) == disk.envelope
        again.disks.check("disk")
    assert marks(root) == []


def test_a_listing_is_the_next_command_too(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, virt_sse: CommandLine
) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    interrupt(monkeypatch, backend)
    virt_sse("disk", "list")
    assert marks(root) == []
    assert carried(disk).generation == 2


def test_without_a_mark_no_image_is_opened(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.disks.create(NewDisk(name="disk", size=M))
    backend.keys.rotate(PLATFORM_KEY)
    assert marks(root) == []

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("an image is opened")

    monkeypatch.setattr(image_file, "opened", opened)
    with Backend.open(root):
        pass


def test_an_image_that_is_away_stops_nothing_and_is_mended_later(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    other = backend.disks.create(NewDisk(name="other", size=M))
    interrupt(monkeypatch, backend)
    away = disk.path.rename(disk.path.with_name("away"))
    with Backend.open(root) as again:
        again.disks.check("other")
    assert "is missing" in caplog.text
    away.rename(disk.path)
    with Backend.open(root) as again:
        again.disks.check("disk")
        again.disks.check("other")
    assert marks(root) == []
    assert carried(other).generation == 2


def test_marks_of_no_disk_and_odd_files_are_harmless(root: Path, backend: Backend) -> None:
    folder = root / "var/lib/virt-sse/pending-envelopes"
    folder.mkdir()
    (folder / "b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11").touch()
    (folder / "nonsense").touch()
    with Backend.open(root):
        assert marks(root) == ["nonsense"]


def test_a_reported_failure_leaves_no_mark(
    root: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.disks.create(NewDisk(name="disk", size=M))

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(envelope_slots, "write", full)
    _, report = backend.keys.rotate(PLATFORM_KEY)
    assert list(report.failed) == ["disk"]
    assert marks(root) == []
