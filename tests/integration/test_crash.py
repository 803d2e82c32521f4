"""A kill -9 before any line of what changes disks, and commands that meet each other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from support.command_line import PROGRAM, CommandLine
from support.faults import crash_points, dies_at, some
from support.forking import run_forked
from support.images import KeyedImage
from virt_sse.backend import Backend
from virt_sse.disks import certificates, creation, erasure, lifecycle, soft_deletion, transfer
from virt_sse.host.setup import initialise
from virt_sse.keys import rewrap
from virt_sse.model import envelope
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import envelope_slots, image_file, img, qcow2
from virt_sse.store import store
from virt_sse.system import files

M = 1 << 20
MODULES = (
    creation,
    lifecycle,
    erasure,
    soft_deletion,
    certificates,
    rewrap,
    transfer,
    envelope,
    envelope_slots,
    files,
    img,
    qcow2,
    store,
)
POINTS = 10
"""About so many of the lines are tried; which ones differs with every change of the code."""


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


class Scene:
    """A host in some state, copied afresh for every kill."""

    def __init__(self, root: Path, prepare: Callable[[Backend], object]) -> None:
        self.root = root
        self.images = root / "var/lib/libvirt/images"
        self._template = root.with_name("template")
        with Backend.open(root) as backend:
            initialise(backend.host)
            prepare(backend)
        root.rename(self._template)
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self._template, self.root)

    def kills(
        self, action: Callable[[Backend], object], check: Callable[[Backend], object], tried: int = POINTS
    ) -> None:
        """Kill *action* before one line after the other, and see *check* hold for the next command.

        :param tried: number of lines; the last line is always among them.
        """

        def act() -> None:
            with Backend.open(self.root) as backend:
                action(backend)

        points = crash_points(MODULES, act)
        self.reset()
        for point in some(points, tried):
            assert dies_at(point, MODULES, act), f"line event {point} did not come"
            with Backend.open(self.root) as backend:
                try:
                    check(backend)
                except BaseException as exc:
                    exc.add_note(f"killed at line event {point}")
                    raise
            self.reset()

    def names(self) -> list[str]:
        return images.files_below(self.images)


def whole(backend: Backend, name: str, pattern: int | None = None) -> Disk:
    """The disk, which passes every check."""
    disk = backend.disks.get(name)
    assert disk.state is DiskState.READY
    backend.disks.check(name)
    image = KeyedImage.of(backend, disk)
    assert image.size() == disk.size == M
    if pattern is not None:
        assert image.has(0, M, pattern)
    return disk


def filled(backend: Backend, image_format: str = "qcow2") -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat(image_format)))
    KeyedImage.of(backend, disk).write(0, M, 0x66)


@pytest.mark.slow
@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_killed_creation_leaves_a_whole_disk_or_nothing(root: Path, image_format: str) -> None:
    scene = Scene(root, lambda _: None)
    outcomes = set()

    def check(backend: Backend) -> None:
        found = [disk.name for disk in backend.disks.all()]
        assert found in ([], ["disk"])
        assert scene.names() == [f"disk.{image_format}"] * len(found)
        if found:
            whole(backend, "disk")
        else:
            assert backend.keys.in_use() == []
        outcomes.add(bool(found))

    scene.kills(
        lambda b: b.disks.create(NewDisk(name="disk", size=M, format=DiskFormat(image_format))), check
    )
    assert outcomes == {True, False}


@pytest.mark.slow
def test_a_killed_copy_leaves_the_source_and_a_whole_disk_or_nothing(root: Path) -> None:
    scene = Scene(root, filled)
    outcomes = set()

    def check(backend: Backend) -> None:
        found = [disk.name for disk in backend.disks.all()]
        assert found in (["disk"], ["copy", "disk"])
        assert scene.names() == [f"{name}.qcow2" for name in found]
        for name in found:
            whole(backend, name, 0x66)
        outcomes.add(len(found))

    scene.kills(lambda b: b.copies.copy([NewDisk(name="copy", source=b.disks.get("disk"))]), check, tried=15)
    assert outcomes == {1, 2}


@pytest.mark.slow
def test_a_killed_import_leaves_a_whole_disk_or_nothing(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"\x66" * M)
    scene = Scene(root, lambda _: None)

    def check(backend: Backend) -> None:
        found = [disk.name for disk in backend.disks.all()]
        assert scene.names() == ["disk.qcow2"] * len(found)
        if found:
            whole(backend, "disk", 0x66)

    scene.kills(lambda b: b.transfer.import_image(NewDisk(name="disk"), source, source_format="raw"), check)


@pytest.mark.slow
@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_killed_deletion_leaves_a_whole_disk_or_nothing(root: Path, image_format: str) -> None:
    scene = Scene(root, lambda backend: filled(backend, image_format))
    outcomes = set()

    def check(backend: Backend) -> None:
        found = [disk.name for disk in backend.disks.all()]
        assert scene.names() == [f"disk.{image_format}"] * len(found)
        if found:
            whole(backend, "disk", 0x66)
        else:
            assert backend.keys.in_use() == []
        outcomes.add(bool(found))

    scene.kills(lambda b: b.disks.erase(b.disks.get("disk")), check)
    assert outcomes == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["deleted", "recovered"])
def test_a_deleted_disk_is_recovered_whatever_was_killed(
    root: Path, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")

    def prepare(backend: Backend) -> None:
        filled(backend)
        if ends == "recovered":
            backend.soft_deletion.delete("disk")

    actions = {
        "deleted": lambda b: b.soft_deletion.delete("disk"),
        "recovered": lambda b: b.soft_deletion.recover("disk"),
    }
    scene = Scene(root, prepare)
    outcomes: set[DiskState] = set()

    def check(backend: Backend) -> None:
        outcomes.add(state := backend.disks.get("disk").state)
        if state is DiskState.DELETED:
            backend.soft_deletion.recover("disk")
        whole(backend, "disk", 0x66)
        assert scene.names() == ["disk.qcow2"]

    scene.kills(actions[ends], check, tried=3)
    assert outcomes == {DiskState.READY, DiskState.DELETED}


@pytest.mark.slow
def test_a_killed_deletion_is_certified_as_soon_as_the_disk_is_gone(root: Path) -> None:
    scene = Scene(root, filled)
    outcomes = set()

    def check(backend: Backend) -> None:
        issued = [name for _, name, _ in backend.certificates.all()]
        found = [disk.name for disk in backend.disks.all()]
        assert sorted(found + issued) == ["disk"]
        if issued:
            certificate = backend.certificates.get("disk")
            statement = certificate.verify(backend.certificates.key.load().public_key())
            assert statement.image == "erased"
            assert [dek.slot for dek in statement.deks] == ["service"]
        else:
            whole(backend, "disk", 0x66)
        outcomes.add(bool(issued))

    scene.kills(lambda b: b.disks.erase(b.disks.get("disk"), certified=True), check, tried=15)
    assert outcomes == {True, False}


@pytest.mark.slow
def test_after_a_killed_deletion_a_new_file_at_the_path_is_not_touched(root: Path) -> None:
    scene = Scene(root, filled)
    path = scene.images / "disk.qcow2"

    def act() -> None:
        with Backend.open(root) as backend:
            backend.disks.erase(backend.disks.get("disk"))

    points = crash_points(MODULES, act)
    for point in points[:: len(points) // 10]:
        scene.reset()
        dies_at(point, MODULES, act)
        path.unlink(missing_ok=True)
        path.write_text("theirs")
        with Backend.open(root):
            assert path.read_text() == "theirs"


@pytest.mark.slow
def test_a_killed_rotation_is_finished_by_the_next(root: Path) -> None:
    scene = Scene(root, filled)

    def check(backend: Backend) -> None:
        disk = backend.disks.get("disk")
        assert KeyedImage.of(backend, disk).has(0, M, 0x66)
        with image_file.opened(disk.path) as descriptor:
            carried = envelope_slots.read(descriptor, disk.format)
        assert carried == disk.envelope, "the next command has written what the killed one could not"
        assert list((scene.root / "var/lib/virt-sse/pending-envelopes").glob("*")) == []
        for entry in disk.deks:
            provider = backend.host.plugins.key_provider(entry.wrapped.key.provider)
            provider.unwrap(entry.wrapped, context=disk.context(entry.slot))
        assert backend.keys.rewrap(PLATFORM_KEY).failed == {}
        current = backend.host.plugins.key_provider(PLATFORM_KEY.provider).current_key(PLATFORM_KEY.name)
        assert [(use.key, use.deks) for use in backend.keys.in_use()] == [(current, 1)]
        whole(backend, "disk", 0x66)

    scene.kills(lambda b: b.keys.rotate(PLATFORM_KEY), check)


@pytest.mark.slow
@pytest.mark.parametrize("encryption_set", [None, "double"])
@pytest.mark.parametrize(("image_format", "size"), [("qcow2", 2 * M), ("raw", M // 2)])
def test_after_a_killed_resize_the_store_has_the_size(
    root: Path, image_format: str, size: int, encryption_set: str | None
) -> None:
    with Backend.open(root) as backend:
        initialise(backend.host)
        backend.sets.create(
            "double",
            provider="platform-managed",
            key="default",
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
        )
        kind = DiskFormat(image_format)
        backend.disks.create(NewDisk(name="disk", size=M, format=kind, encryption_set=encryption_set))

    def act() -> None:
        store.Store.set_size = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        with Backend.open(root) as backend:
            backend.disks.resize("disk", size, shrink=True)

    assert run_forked(act) == -signal.SIGKILL
    (listed,) = json.loads(CommandLine(root)("disk", "list", "--output", "json"))
    assert listed["size"] == size, "listings finish the work of killed commands, too"
    with Backend.open(root) as backend:
        disk = backend.disks.get("disk")
        deks = backend.host.keys.unwrap_all(disk)
        assert disk.size == img.usable_size_within(disk.path, disk.format, deks) == size
        assert list((root / "var/lib/virt-sse/pending-resizes").glob("*")) == []


@pytest.mark.slow
def test_a_killed_export_leaves_no_plaintext(root: Path, tmp_path: Path) -> None:
    scene = Scene(root, filled)
    folder = tmp_path / "exports"
    folder.mkdir()

    def check(backend: Backend) -> None:
        if found := list(folder.iterdir()):
            assert found == [folder / "out"]
            assert KeyedImage.of(backend, backend.disks.get("disk")).equals(folder / "out")
            found[0].unlink()
        whole(backend, "disk", 0x66)

    def export(backend: Backend) -> None:
        (folder / "out").unlink(missing_ok=True)
        backend.transfer.export("disk", folder / "out", destination_format="raw")

    scene.kills(export, check)


@pytest.mark.slow
def test_a_command_killed_at_any_moment_leaves_no_process_and_no_file(root: Path) -> None:
    scene = Scene(root, lambda _: None)
    for tenths in range(0, 10, 1):
        command = [PROGRAM, "disk", "create", "disk", "-s", "1M"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(0.3 + tenths / 40)
            process.send_signal(signal.SIGKILL)
        with Backend.open(root) as backend:
            found = backend.disks.all()
            assert scene.names() == ["disk.qcow2"] * len(found)
            if found:
                whole(backend, "disk")
        scene.reset()


@pytest.mark.slow
def test_one_of_two_simultaneous_creations_wins(root: Path) -> None:
    scene = Scene(root, lambda _: None)
    script = (
        "import sys; from virt_sse.backend import Backend; from virt_sse.errors import DiskExistsError\n"
        "from virt_sse.model.disks import NewDisk\n"
        "with Backend.open() as backend:\n"
        "    for line in sys.stdin:\n"
        "        new = NewDisk(name=line.strip(), size=1 << 20)\n"
        "        try: backend.disks.create(new); print('won', flush=True)\n"
        "        except DiskExistsError as exc: print('lost', flush=True)\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(2)
    ]
    try:
        for number in range(20):
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"disk-{number}\n")
            assert sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout) == [
                "lost",
                "won",
            ]
    finally:
        for racer in racers:
            assert racer.stdin is not None
            assert racer.stdout is not None
            racer.stdin.close()
            racer.wait()
            racer.stdout.close()
    with Backend.open(root) as backend:
        assert len(backend.disks.all()) == 20
        assert len(scene.names()) == 20
        for disk in backend.disks.all():
            assert disk.state is DiskState.READY
            backend.disks.check(disk.name)
