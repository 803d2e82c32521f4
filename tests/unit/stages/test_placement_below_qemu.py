"""All layers of a disk in one storage daemon, under the guest's QEMU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import images
from support.clone_images import filled
from support.domain_qemu import as_qemu
from support.faults import crash_points, dies_at
from support.stage_disks import DOMAIN, M, StagedDisk, kill
from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.model.layers import GuestNode, LayerPlan, Placement, StorageNode
from virt_sse.qemu import image_file, img
from virt_sse.stages import lent_images, stages
from virt_sse.stages.record import StageRecord
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import DiskVerdict

Make = Callable[..., StagedDisk]
ALL = [(image_format, double) for image_format in images.FORMATS for double in (False, True)]


@pytest.fixture
def make(folder: Path, as_root: None) -> Iterator[Make]:
    """Makes disks placed in the storage daemon, and ends their stages."""
    images.require("qemu-storage-daemon", "qemu-io", "qemu-img", "cryptsetup", "nbdinfo")
    config = Config.load(folder)
    made: list[StagedDisk] = []

    def make_one(image_format: str, *, double: bool) -> StagedDisk:
        made.append(StagedDisk(config, image_format, double=double, placement=Placement.STORAGE))
        return made[-1]

    yield make_one
    for disk in made:
        disk.stop()


def size_at_the_socket(disk: StagedDisk, export: str) -> subprocess.CompletedProcess[str]:
    uri = f"nbd+unix:///{export}?socket={disk.stages.guest_socket(disk.disk.id)}"
    qemu = as_qemu(disk.config.qemu_pid_file("web"))
    return subprocess.run([*qemu, "nbdinfo", "--size", uri], capture_output=True, text=True)


def verify(disk: StagedDisk, plan: LayerPlan | None = None) -> DiskVerdict:
    verdict = DiskVerdict("vda")
    StageEvidence(disk.stages).check(verdict, disk.disk, plan or disk.plan, DOMAIN)
    return verdict


@pytest.mark.parametrize(("image_format", "double"), ALL)
def test_one_process_serves_all_layers(make: Make, image_format: str, double: bool) -> None:
    disk = make(image_format, double=double)
    disk.image_io("write -P 0x11 0 64k")  # as by a guest with the DEKs in its QEMU
    disk.start()
    (pid,) = disk.pids()
    (record,) = disk.stages.records()
    assert (record.guest_slot, record.stages) == (None, disk.plan.stages)
    assert disk.stages.dek_slots(record) == [*disk.deks]
    assert int(size_at_the_socket(disk, plain_export(disk.disk.id)).stdout) == M
    assert size_at_the_socket(disk, str(disk.disk.id)).returncode, "the name for the other placement"
    assert "failed" not in disk.guest_io("read -P 0x11 0 64k", "write -P 0x22 64k 64k", "flush")
    verdict = verify(disk)
    assert verdict.problems == []
    ciphers = [(layer.where, layer.slot, layer.cipher) for layer in verdict.layers]
    assert ciphers == [("storage daemon", entry.slot, str(entry.cipher)) for entry in disk.disk.deks]
    assert [place.is_plaintext for place in verdict.places] == [True]
    for dek in disk.deks.values():
        assert dek.passphrase not in Path(f"/proc/{pid}/cmdline").read_bytes()
    disk.stop()
    disk.assert_nothing_is_left()
    assert "failed" not in disk.image_io("read -P 0x11 0 64k", "read -P 0x22 64k 64k")
    assert b"\x22" * 4096 not in disk.disk.path.read_bytes()


@pytest.mark.parametrize("double", [False, True])
def test_a_killed_process_is_restarted_for_raw_only(make: Make, double: bool) -> None:
    disk = make("raw", double=double)
    disk.start()
    disk.guest_io("write -P 0x33 4096 4096")
    kill(disk, "storage")
    assert "the storage daemon does not run" in verify(disk).problems
    disk.stages.restart(disk.disk.id, disk.deks)
    assert "failed" not in disk.guest_io("read -P 0x33 4096 4096")
    assert verify(disk).problems == []
    qcow2 = make("qcow2", double=double)
    qcow2.start()
    kill(qcow2, "storage")
    with pytest.raises(StageError, match="unflushed writes are lost"):
        qcow2.stages.restart(qcow2.disk.id, qcow2.deks)


def test_a_wrong_dek_of_either_layer_serves_nothing(make: Make) -> None:
    disk = make("raw", double=True)
    for slot in disk.deks:
        with pytest.raises(StageError, match="Invalid password") as failure:
            disk.start(deks=disk.deks | {slot: Dek.generate()})
        for dek in disk.deks.values():
            assert dek.passphrase.decode() not in str(failure.value)
        disk.assert_nothing_is_left()


@pytest.mark.parametrize(("image_format", "double"), ALL)
def test_all_volumes_grow_under_a_guest_that_connects_again(
    make: Make, image_format: str, double: bool
) -> None:
    disk = make(image_format, double=double)
    disk.start()
    with pytest.raises(StageError, match="cannot grow under a running guest"):
        disk.stages.grow(disk.disk, 5 * M, reconnects=False)
    disk.stages.grow(disk.disk, 5 * M, reconnects=True)
    export = plain_export(disk.disk.id)
    assert int(size_at_the_socket(disk, export).stdout) == 5 * M
    assert "failed" not in disk.guest_io(f"write -P 0x44 {5 * M - 4096} 4096")
    assert verify(disk).problems == []
    disk.stop()
    deks = list(disk.deks.values())
    if double:
        assert img.usable_size_within(disk.disk.path, disk.disk.format, deks) == 5 * M
    else:
        with image_file.opened(disk.disk.path) as descriptor:
            assert image_file.usable_size(descriptor, disk.disk.format) == 5 * M
    assert "failed" not in disk.image_io(f"read -P 0x44 {5 * M - 4096} 4096")


@pytest.mark.parametrize("double", [False, True])
def test_discarded_clusters_return_to_the_file_system(make: Make, double: bool) -> None:
    disk = make("qcow2", double=double)
    before = blocks(disk)
    disk.start()
    disk.guest_io("write -P 0x55 0 1M", "flush")
    filled = blocks(disk)
    assert filled >= before + M
    disk.guest_io("discard 0 1M", "flush")
    assert blocks(disk) <= filled - 3 * M // 4
    assert "failed" not in disk.guest_io("read -P 0 0 1M")
    disk.guest_io("write -P 0x55 0 1M", "write -z 0 1M", "flush")
    assert "failed" not in disk.guest_io("read -P 0 0 1M")


def blocks(disk: StagedDisk) -> int:
    return os.stat(disk.disk.path).st_blocks * 512  # noqa: PTH116 -- as in the module


def test_another_placement_than_asked_for_is_a_problem(make: Make) -> None:
    disk = make("raw", double=True)
    disk.start()
    in_guest = dataclasses.replace(disk.plan, stages=(GuestNode("service"), StorageNode("infrastructure")))
    assert verify(disk, in_guest).problems == [
        "the storage daemon was started for ['service', 'infrastructure'], infrastructure was asked for"
    ]


def test_a_missing_gate_before_plaintext_is_a_problem(make: Make) -> None:
    disk = make("raw", double=False)
    disk.start()
    (record,) = disk.stages.records()
    folder = disk.config.stage_directory / str(disk.disk.id)
    dataclasses.replace(record, gated=False).write(folder)
    assert "no gate stands between the guest's QEMU and the plaintext" in verify(disk).problems
    record.write(folder)
    assert StageRecord.read(folder) == record
    assert record.format is DiskFormat.RAW


def flags(pid: int, path: Path) -> list[int]:
    """The access modes with which a process has a file open."""
    folder = Path(f"/proc/{pid}")
    numbers = [each.name for each in (folder / "fd").iterdir() if each.resolve() == path.resolve()]
    lines = [(folder / "fdinfo" / number).read_text().splitlines() for number in numbers]
    return [int(line.split()[1], 8) & os.O_ACCMODE for each in lines for line in each if "flags:" in line]


def test_daemons_of_two_clones_read_one_image_and_cannot_write_it(make: Make) -> None:
    clones = [make("qcow2", double=double) for double in (False, True)]
    base = filled(clones[0].config.root, "raw", double=True)
    for number, clone in enumerate(clones):
        clone.base = base
        clone.start()
        assert "failed" not in clone.guest_io(f"write -P {0x60 + number} 64k 4k", "flush")
        assert base.path.stat().st_uid == 0
    for number, clone in enumerate(clones):
        (pid,) = clone.pids()
        assert flags(pid, base.path) == [os.O_RDONLY]
        said = clone.guest_io(f"read -P {0x60 + number} 64k 4k", "read -v 0 16")
        assert "failed" not in said
        assert "what.the.image.h" in said, "as of the image"
    for clone in clones:
        clone.stop()
        clone.assert_nothing_is_left()
    image_file.refuse_if_open(base.path)


def test_a_clone_whose_start_is_killed_anywhere_leaves_the_image_to_its_owner(make: Make) -> None:
    clone = make("qcow2", double=False)
    clone.base = filled(clone.config.root, "raw", double=False)
    modules = [stages, lent_images]
    points = crash_points(modules, clone.start)
    clone.stop()
    assert len(points) > 30
    for point in points[:: max(1, len(points) // 8)]:
        assert dies_at(point, modules, clone.start)
        clone.stop()
        clone.assert_nothing_is_left()
        assert clone.base.path.stat().st_uid == 0
