"""A third kind of stage process needs one module and one entry in the list of kinds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pass_through import PassThrough, PassThroughProcess

from support import images
from support.stage_disks import DOMAIN, StagedDisk, kill
from support.stage_programs import command_line
from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, StageError
from virt_sse.libvirt.users import User
from virt_sse.model.layers import GuestNode, HostCache, HostCaching, LayerPlan, StorageNode
from virt_sse.qemu import image_file
from virt_sse.stages import Stages
from virt_sse.stages.host_cache import HostCacheProcess
from virt_sse.stages.kinds import STAGE_KINDS
from virt_sse.stages.record import StageRecord
from virt_sse.stages.storage_daemon import StorageDaemonProcess
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import DiskVerdict

KINDS = (HostCacheProcess, PassThroughProcess, StorageDaemonProcess)
NONE, READ_ONLY, _ = HostCaching
Make = Callable[..., StagedDisk]


@pytest.fixture
def make(folder: Path, user: User) -> Iterator[Make]:
    """Makes raw disks with a proxy, and ends their stages."""
    images.require("qemu-storage-daemon", "qemu-io", "qemu-img", "cryptsetup", "nbdkit")
    config = dataclasses.replace(Config.load(folder), storage_user=str(user.uid))
    made: list[StagedDisk] = []

    def make_one(image_format: str = "raw", *, double: bool, caching: HostCaching) -> StagedDisk:
        disk = StagedDisk(config, image_format, double=double, caching=caching, kinds=KINDS)
        disk.plan = with_proxy(disk.plan)
        made.append(disk)
        return disk

    yield make_one
    for disk in made:
        disk.stop()


def with_proxy(plan: LayerPlan) -> LayerPlan:
    """*plan* with a proxy after the host cache, if there is one."""
    upper = [stage for stage in plan.stages if isinstance(stage, GuestNode | HostCache)]
    lower = [stage for stage in plan.stages if isinstance(stage, StorageNode)]
    return dataclasses.replace(plan, stages=(*upper, PassThrough(), *lower))


def problems(disk: StagedDisk) -> list[str]:
    verdict = DiskVerdict("vda")
    StageEvidence(disk.stages).check(verdict, disk.disk, disk.plan, DOMAIN)
    return verdict.problems


@pytest.mark.parametrize(
    ("double", "caching", "names"),
    [
        (True, READ_ONLY, ["cache", "proxy", "storage"]),
        (True, NONE, ["proxy", "storage"]),
        (False, READ_ONLY, ["cache", "proxy"]),
        (False, NONE, ["proxy"]),
    ],
)
def test_start_record_verify_restart_stop(
    make: Make, double: bool, caching: HostCaching, names: list[str]
) -> None:
    disk = make(double=double, caching=caching)
    disk.start()
    (record,) = disk.stages.records()
    assert record.stages == disk.plan.stages[1:]
    assert [each.name for each in disk.stages.processes(record)] == names
    assert disk.stages.dead(record) == []
    assert "wrote 8192" in disk.guest_io("write -P 0x5a 4096 8192")
    assert problems(disk) == []

    kill(disk, "proxy")
    assert disk.stages.dead(record) == ["proxy"]
    assert "the pass-through proxy does not run" in problems(disk)
    disk.stages.restart(disk.disk.id, disk.deks)
    assert disk.stages.dead(record) == []
    assert "failed" not in disk.guest_io("read -P 0x5a 4096 8192", "flush")
    assert problems(disk) == []

    with pytest.raises(DiskInUseError):
        image_file.refuse_if_open(disk.disk.path)
    with pytest.raises(StageError, match=r"has a (host cache|pass-through proxy), which does not grow"):
        disk.stages.grow(disk.disk, 5 << 20, reconnects=True)
    disk.stages.stop_domain(DOMAIN)
    disk.assert_nothing_is_left()
    assert "failed" not in disk.image_io("read -P 0x5a 4096 8192")


def test_data_passes_all_processes(make: Make) -> None:
    disk = make(double=True, caching=READ_ONLY)
    disk.start()
    sockets = disk.config.socket_directory / str(disk.disk.id) / "stages"
    cache, proxy = (command_line(pid) for name in ("cache", "proxy") if (pid := disk.process(name).pid()))
    assert f"socket={sockets}/proxy" in cache
    assert f"socket={sockets}/nbd" in proxy


def test_a_qcow2_image_that_the_proxy_opens_is_extended_and_locked(make: Make) -> None:
    disk = make("qcow2", double=False, caching=NONE)
    disk.start()
    assert "wrote 1048576" in disk.guest_io("write -P 0x5a 0 1M")
    with pytest.raises(DiskInUseError):
        image_file.refuse_if_open(disk.disk.path)
    assert problems(disk) == []


def test_a_missing_proxy_is_a_problem(make: Make) -> None:
    disk = make(double=True, caching=NONE)
    disk.start()
    disk.plan = dataclasses.replace(disk.plan, stages=(GuestNode("service"), StorageNode("infrastructure")))
    assert problems(disk) == ["there is a pass-through proxy, and none was asked for"]
    disk.start()
    disk.plan = with_proxy(disk.plan)
    assert problems(disk) == ["there is no pass-through proxy"]


def test_records_from_before_the_third_kind_are_read(make: Make) -> None:
    disk = make(double=True, caching=NONE)
    disk.start()
    path = disk.config.stage_directory / str(disk.disk.id) / "stages.json"
    written = json.loads(path.read_bytes())
    assert written.pop("pass-through") is True
    assert written.pop("order") == ["proxy", "storage"]
    path.write_text(json.dumps(written))
    found = StageRecord.read(path.parent, KINDS)
    assert found == StageRecord.read(path.parent, STAGE_KINDS)
    assert found
    assert found.stages == (StorageNode("infrastructure"),)


def test_a_process_that_the_record_does_not_name_is_ended_too(make: Make) -> None:
    disk = make(double=False, caching=NONE)
    disk.start()
    (disk.config.stage_directory / str(disk.disk.id) / "stages.json").unlink()
    disk.stop()
    wait_until(lambda: not disk.pids(), "all stage processes have ended")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((GuestNode("service"), PassThrough()), "no kind of process serves the stage PassThrough"),
        ((GuestNode("service"), HostCache(READ_ONLY), HostCache(READ_ONLY)), "stages are out of order"),
        ((StorageNode("x"), HostCache(READ_ONLY), StorageNode("y")), "stages are out of order"),
        ((HostCache(READ_ONLY), StorageNode("x")), "stages are out of order"),
        ((HostCache(READ_ONLY),), "stages are out of order"),
        ((), "stages are out of order"),
    ],
)
def test_a_plan_that_the_list_of_kinds_does_not_allow_is_refused(
    make: Make, stages: tuple[GuestNode, ...], message: str
) -> None:
    disk = make(double=True, caching=NONE)
    disk.plan = LayerPlan(deks=(), stages=stages)
    disk.stages = Stages(disk.config)
    with pytest.raises(StageError, match=message):
        disk.start()
    disk.assert_nothing_is_left()
