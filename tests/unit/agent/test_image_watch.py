"""The agent's look at the folders of images."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from support import images
from virt_sse.agent.image_watch import ImageWatch
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.disks.missing_images import missing_images
from virt_sse.host.setup import initialise
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.store.store import Store

M = 1 << 20


def test_missing_images_and_plaintext_beside_images_are_found(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images.require("qemu-img", "cryptsetup")
    caplog.set_level(logging.INFO, "virt_sse.agent")
    with Backend.open(root) as backend:
        initialise(backend.host)
        disk = backend.disks.create(NewDisk(name="web", size=M, format=DiskFormat.RAW))
        other = backend.disks.create(NewDisk(name="db", size=M))
        watch = ImageWatch(backend, Metrics(), 60)
        watch._look()
        assert caplog.messages == []

        def beside(suffix: str) -> Path:
            return disk.path.with_name(f"{disk.path.name}.{suffix}")

        shutil.copy(disk.path, beside("ciphertext"))
        os.truncate(os.open(beside("hole"), os.O_CREAT | os.O_WRONLY), M)
        (root / "elsewhere").write_bytes(b"plain" * 1000)
        beside("sha256").write_text("a checksum")
        beside("link").symlink_to(root / "elsewhere")
        watch._look()
        assert caplog.messages == []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", beside("1700000000"), "1M"], check=True)
        beside("raw").write_bytes(b"plain" + bytes(M - 5))
        other.path.rename(root / "moved")
        for _ in range(2):
            watch._look()
        events = [(record.getMessage(), record.virt_sse_fields) for record in caplog.records]  # type: ignore[attr-defined]
        assert events[0] == ("image-missing", {"disk": "db", "path": str(other.path)})
        places = {fields["place"] for event, fields in events[1:] if event == "plaintext-beside"}
        assert places == {str(beside("1700000000")), str(beside("raw"))}
        assert len(events) == 3, "each is reported once"
        (root / "moved").rename(other.path)
        watch._look()
        assert caplog.messages[3:] == ["image-back"]


def test_only_images_of_this_host_are_looked_for(root: Path) -> None:
    images.require("qemu-img", "cryptsetup")
    with Backend.open(root) as backend:
        initialise(backend.host)
        ours, theirs = (backend.disks.create(NewDisk(name=name, size=M)) for name in ("ours", "theirs"))
        states = backend.host.config.image_states
        (states / str(theirs.id)).unlink()
        for disk in (ours, theirs):
            disk.path.unlink()
        assert missing_images([ours, theirs], states) == {ours.id}


def test_the_paths_of_all_images_are_kept(root: Path) -> None:
    """For the hook script; a lost or damaged file is written again."""
    images.require("qemu-img", "cryptsetup")
    with Backend.open(root) as backend:
        initialise(backend.host)
        first = backend.disks.create(NewDisk(name="first", size=M))
        paths = backend.host.image_paths
        xml = f"<disk><driver name='qemu'/><source file='{first.path}'/></disk>"
        assert paths.mentioned(xml)
        assert paths.mentioned(f"<source pool='p' volume='{first.path.name}'/>")
        assert not paths.mentioned(xml.replace(first.path.name, "x"))
        assert paths.file.stat().st_mode & 0o777 == 0o600
        paths.file.unlink()
        assert not paths.mentioned(xml)
        second = backend.disks.create(NewDisk(name="second", size=M))
        ImageWatch(backend, Metrics(), 60)._look()
        assert paths.among({first.path, second.path, root}) == {first.path, second.path}
        moved = first.path.with_name("moved.qcow2")
        first.path.rename(moved)
        backend.disks.adopt(moved)
        assert paths.among({first.path, moved}) == {first.path, moved}
        ImageWatch(backend, Metrics(), 60)._look()
        assert paths.among({first.path, moved}) == {moved}


def test_a_look_reads_the_changes_since_the_look_before(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks of other hosts are found, and a lost or torn file of paths is mended."""
    images.require("qemu-img", "cryptsetup")
    caplog.set_level(logging.INFO, "virt_sse.agent")
    with Backend.open(root) as backend, contextlib.closing(Store(backend.host.config.store_url)) as other:
        initialise(backend.host)
        first = backend.disks.create(NewDisk(name="first", size=M, format=DiskFormat.RAW))
        paths, watch = backend.host.image_paths, ImageWatch(backend, Metrics(), 60)
        watch._look()
        asked: list[int] = []
        paths_since = backend.host.store.paths_since
        monkeypatch.setattr(
            backend.host.store, "paths_since", lambda number: (asked.append(number), paths_since(number))[1]
        )
        monkeypatch.delattr(Store, "all")
        theirs = dataclasses.replace(
            first, id=uuid.uuid4(), name="theirs", path=first.path.with_name("t.raw")
        )
        with paths.file.open("a") as file:
            file.write("'/torn by a full di")
        other.add(theirs)
        theirs.path.with_name("t.raw.1").write_bytes(b"plain" + bytes(M - 5))
        watch._look()
        watch._look()
        assert caplog.messages == ["plaintext-beside"]
        assert paths.among({first.path, theirs.path}) == {first.path, theirs.path}
        other.set_path(theirs.id, moved := first.path.with_name("moved.raw"))
        moved.with_name("moved.raw.1").write_bytes(b"plain" + bytes(M - 5))
        watch._look()
        assert caplog.messages == ["plaintext-beside"] * 2
        assert paths.among({moved}) == {moved}
        assert asked == [1, 2, 2]
        first.path.unlink()
        watch._look()
        assert caplog.messages[2:] == ["image-missing"]
        other.remove(first.id)
        watch._look()
        watch._look()
        assert len(caplog.messages) == 3
        assert asked == [1, 2, 2, 3, 3, 3]
        paths.file.unlink()
        watch._look()
        assert paths.among({first.path, moved}) == {moved}
        assert asked[6:] == [-1]
