from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import virt_sse.stages.gate_process
import virt_sse.stages.host_cache
import virt_sse.stages.sockets
import virt_sse.stages.stages
import virt_sse.stages.storage_daemon
from support import images
from support.faults import crash_points, dies_at, some
from support.processes import open_files
from support.stage_disks import DOMAIN, QEMU, M, StagedDisk, kill
from support.stage_programs import command_line, status
from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, ImageError, StageError, ToolError
from virt_sse.libvirt.users import User
from virt_sse.model.keys import Dek
from virt_sse.model.layers import HostCaching
from virt_sse.qemu import image_file, img, qcow2, qmp
from virt_sse.stages import Stages
from virt_sse.stages.locked_process import Command
from virt_sse.stages.storage_daemon import StorageDaemonProcess

NONE, READ_ONLY, READ_WRITE = HostCaching
Make = Callable[..., StagedDisk]
MODULES = [
    virt_sse.stages.stages,
    virt_sse.stages.sockets,
    virt_sse.stages.gate_process,
    virt_sse.stages.host_cache,
    virt_sse.stages.storage_daemon,
]
"""The code that starts and ends stage processes."""


@pytest.fixture
def config(folder: Path, as_root: None) -> Config:
    images.require("qemu-storage-daemon", "qemu-io", "qemu-img", "cryptsetup", "nbdkit")
    return Config.load(folder)


@pytest.fixture
def make(config: Config) -> Iterator[Make]:
    """Makes disks, and ends their stages."""
    made: list[StagedDisk] = []

    def make_one(*arguments: object, **options: object) -> StagedDisk:
        made.append(StagedDisk(config, *arguments, **options))  # type: ignore[arg-type] # handed on
        return made[-1]

    yield make_one
    for disk in made:
        disk.stop()


@pytest.mark.parametrize("image_format", images.FORMATS)
@pytest.mark.parametrize("caching", HostCaching)
@pytest.mark.parametrize("double", [False, True])
def test_data_written_by_a_guest_is_in_the_image(
    make: Make, image_format: str, caching: HostCaching, double: bool
) -> None:
    disk = make(image_format, double=double, caching=caching)
    disk.start()
    names = {Path(command_line(pid)[0]).name for pid in disk.pids()}
    assert names == {
        *(["qemu-storage-daemon"] if double else []),
        *(["nbdkit"] if caching is not NONE else []),
    }
    if not names:
        assert disk.stages.records() == []
        return
    said = disk.guest_io("write -P 0x5a 4096 8192", "flush", "read -P 0x5a 4096 8192")
    assert said.count("8192/8192") == 2, said
    assert "failed" not in said
    with pytest.raises(DiskInUseError):
        image_file.refuse_if_open(disk.disk.path)
    disk.stop()
    disk.assert_nothing_is_left()
    said = disk.image_io("read -P 0x5a 4096 8192", "length")
    assert "failed" not in said
    assert "1 MiB" in said
    assert not images.contains([disk.disk.path], b"\x5a" * 32)
    if image_format == "qcow2":
        img.check(disk.disk.path, disk.disk.format, list(disk.deks.values()))


def test_files_and_processes_have_least_rights(make: Make) -> None:
    disk = make("raw", caching=READ_ONLY)
    disk.start()
    (record,) = disk.stages.records()
    cache, storage = record.user("cache"), record.user("storage")
    for name, user in (("cache", cache), ("storage", storage)):
        pid = disk.process(name).pid()
        assert pid
        assert status(pid)["Uid"].split() == [str(user.uid)] * 4
        assert status(pid)["Gid"].split() == [str(cache.gid)] * 4
    assert len({cache.uid, storage.uid, QEMU.uid, 0}) == 4
    owner = disk.disk.path.stat()
    expected = (cache.uid, cache.gid, 0o600)  # nbdkit opens the image per connection
    assert (owner.st_uid, owner.st_gid, images.mode(disk.disk.path)) == expected
    sockets = disk.config.socket_directory / str(disk.disk.id)
    found = {
        path.name: (images.mode(path), path.stat().st_uid, path.stat().st_gid) for path in sockets.iterdir()
    }
    assert found == {"guest": (0o710, 0, QEMU.gid), "stages": (0o710, 0, cache.gid)}
    assert images.mode(disk.config.stage_directory) == 0o700
    guest, inner = sockets / "guest/nbd", sockets / "stages/cache"
    folder = disk.config.stage_directory / str(disk.disk.id)
    outsider = User(64999, 64999)
    reached = {
        (who.uid, path)
        for who in (QEMU, cache, storage, outsider)
        for path in (guest, inner, folder / "qmp", folder / "nbd")
        if can_connect(who, path)
    }
    assert reached == {(QEMU.uid, guest), (storage.uid, inner)}
    assert can_connect(User(0, 0), folder / "nbd")


def can_connect(user: User, path: Path) -> bool:
    script = (
        f"import os, socket; os.setgroups([]); os.setgid({user.gid}); os.setuid({user.uid})\n"
        f"try: socket.socket(socket.AF_UNIX).connect({str(path)!r})\n"
        "except PermissionError: raise SystemExit(1)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], check=False)
    assert done.returncode in (0, 1)
    return done.returncode == 0


@pytest.mark.parametrize("caching", [READ_ONLY, READ_WRITE])
@pytest.mark.parametrize("double", [False, True])
def test_a_cache_holds_ciphertext_in_a_file_without_a_name(
    make: Make, caching: HostCaching, double: bool
) -> None:
    disk = make("qcow2", double=double, caching=caching)
    disk.start()
    said = disk.guest_io("write -P 0x5a 0 1M", "flush", "read -P 0x5a 0 1M")
    assert said.count("1 MiB") >= 2, said
    folder = disk.config.cache_directory / str(disk.disk.id)
    cached = files_without_a_name(disk, folder)
    assert cached
    assert sum(path.stat().st_blocks * 512 for path in cached) >= M
    assert not images.contains(cached, b"\x5a" * 32)
    assert list(folder.iterdir()) == []
    assert images.mode(folder) == 0o700
    assert images.mode(disk.config.cache_directory) == 0o711
    assert disk.config.cache_directory.stat().st_uid == 0
    if double:
        # The cache is below the storage daemon: of the two LUKS headers, the cache holds the outer only.
        assert b"".join(path.read_bytes() for path in cached).count(b"LUKS\xba\xbe") == 1


def files_without_a_name(disk: StagedDisk, folder: Path) -> list[Path]:
    """What the disk's cache has open that lies in *folder* and in no folder's listing."""
    pid = disk.process("cache").pid()
    return [
        Path(f"/proc/{pid}/fd/{number}")
        for number, file in open_files(pid).items()
        if file.name.endswith("(deleted)") and file.parent == folder
    ]


@pytest.mark.parametrize("double", [False, True])
def test_a_qcow2_below_a_cache_has_all_the_room_that_it_can_need(make: Make, double: bool) -> None:
    disk = make("qcow2", double=double, caching=READ_ONLY)
    disk.start()
    info = disk.disk.path.stat()
    room = qcow2.most_room(M)
    assert info.st_size >= (qcow2.most_room(room) if double else room)
    assert info.st_blocks * 512 < 4 * M
    assert "wrote 1048576" in disk.guest_io("write -P 0x5a 0 1M")


def test_stages_are_made_anew(make: Make) -> None:
    disk = make("qcow2")
    disk.start()
    (first,) = disk.pids()
    disk.start()
    (second,) = disk.pids()
    assert second != first
    (record,) = disk.stages.records()
    assert record == disk.stages.record(disk.disk.id)
    assert (record.domain, record.domain_id, record.owner) == ("web", DOMAIN, User(0, 0))
    disk.stop()
    disk.assert_nothing_is_left()
    disk.stop()


def test_a_domains_stages_are_ended_and_no_others(make: Make) -> None:
    one, two, other = make("qcow2"), make("raw", caching=READ_ONLY), make("raw")
    one.start()
    two.start()
    other.start(domain_id=uuid.UUID(int=8))
    Stages(one.config).stop_domain(DOMAIN)
    one.assert_nothing_is_left()
    two.assert_nothing_is_left()
    assert len(other.pids()) == 1
    (one.config.stage_directory / "nonsense").mkdir()
    assert [record.disk_id for record in one.stages.records()] == [other.disk.id]


def test_another_domains_stages_are_left_alone(make: Make) -> None:
    disk, other = make("qcow2"), uuid.UUID(int=8)
    disk.start()
    pids = disk.pids()
    with pytest.raises(DiskInUseError, match="in use by domain 'web'"):
        disk.start(domain_id=other)
    with pytest.raises(DiskInUseError, match="in use by domain 'web'"):
        disk.start(domain_id=other, replacing=uuid.UUID(int=9))
    disk.stages.stop(disk.disk.id, domain_id=other)
    assert disk.pids() == pids
    disk.start(domain_id=other, replacing=DOMAIN)
    assert disk.pids() not in ([], pids)
    disk.stages.stop(disk.disk.id, domain_id=other)
    disk.assert_nothing_is_left()


class TestNothingIsLeftOfAStartThatFails:
    def test_another_dek_is_refused_and_not_shown(self, make: Make) -> None:
        disk = make("qcow2", caching=READ_ONLY)
        wrong = Dek.generate()
        with pytest.raises(
            StageError, match=r"the storage daemon cannot serve .*: Invalid password"
        ) as failure:
            disk.start(deks={"infrastructure": wrong})
        disk.assert_nothing_is_left()
        said = "".join(traceback.format_exception(failure.value))
        assert wrong.passphrase.decode() not in said

    def test_an_image_in_use_is_refused(self, make: Make) -> None:
        disk = make("raw")
        keyed = images.KeyedImage(disk.disk.path, "raw", disk.deks["infrastructure"].passphrase)
        with keyed.held():
            with pytest.raises(DiskInUseError, match="in use by a running domain or another QEMU process"):
                disk.start()
            assert disk.pids() == []
        disk.assert_nothing_is_left()

    def test_a_missing_program_is_reported(
        self, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = make("raw", caching=READ_ONLY)
        (folder / "bin").mkdir()
        daemon = shutil.which("qemu-storage-daemon")
        assert daemon
        (folder / "bin/qemu-storage-daemon").symlink_to(daemon)
        with monkeypatch.context() as patched:
            patched.setenv("PATH", str(folder / "bin"))
            with pytest.raises(ToolError, match=r"^nbdkit is not installed"):
                disk.start()
        disk.assert_nothing_is_left()

    def test_a_cache_that_does_not_start_is_reported(
        self, make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = make("raw", double=False, caching=READ_ONLY)
        (folder / "bin").mkdir()
        (folder / "bin/nbdkit").write_text("#!/bin/sh\necho no such filter >&2; exit 1\n")
        (folder / "bin/nbdkit").chmod(0o755)
        with monkeypatch.context() as patched:
            patched.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
            with pytest.raises(StageError, match=r"the host cache cannot serve .*no such filter"):
                disk.start()
        disk.assert_nothing_is_left()

    def test_a_path_too_long_for_a_socket_is_refused(self, make: Make, config: Config, folder: Path) -> None:
        root = folder / ("x" * 60)
        root.mkdir()
        disk = StagedDisk(dataclasses.replace(config, root=root), "raw")
        with pytest.raises(StageError, match=r"too long for a socket, by [0-9]+ bytes"):
            disk.start()
        disk.assert_nothing_is_left()

    def test_a_missing_image_is_reported(self, make: Make) -> None:
        disk = make("raw")
        disk.disk.path.unlink()
        with pytest.raises(ImageError, match="is missing"):
            disk.start()
        assert disk.stages.records() == []


def test_a_daemon_that_hangs_once_is_started_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = make("raw")
    command, programs = StorageDaemonProcess.command, []

    def hangs_once(process: StorageDaemonProcess, listening: Sequence[int]) -> Command:
        asked = command(process, listening)
        arguments = asked.arguments if programs else ["sleep", "60"]
        programs.append(arguments[0])
        return dataclasses.replace(asked, arguments=arguments)

    monkeypatch.setattr(StorageDaemonProcess, "command", hangs_once)
    monkeypatch.setattr(qmp, "_TIMEOUT", 2.0)
    disk.start()
    assert programs == ["sleep", "qemu-storage-daemon"]
    assert len(disk.pids()) == 1
    assert "read 512/512" in disk.guest_io("read 0 512")


def test_a_start_that_is_killed_anywhere_is_no_hindrance(make: Make) -> None:
    disk = make("qcow2", caching=READ_ONLY)
    modules = MODULES
    points = crash_points(modules, disk.start)
    disk.stop()
    assert len(points) > 50
    for number, point in enumerate(some(points, 14)):
        assert dies_at(point, modules, disk.start)
        if number % 4 == 0:
            disk.start()
            assert len(disk.pids()) == 2
        disk.stop()
        disk.assert_nothing_is_left()


def test_an_end_that_is_killed_anywhere_is_no_hindrance(make: Make) -> None:
    disk = make("qcow2", caching=READ_ONLY)
    modules = MODULES
    disk.start()
    points = crash_points(modules, disk.stop)
    assert len(points) > 20
    for number, point in enumerate(some(points, 14)):
        if number % 4 == 0:
            disk.start()
        dies_at(point, modules, disk.stop)
        disk.stop()
        disk.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("name", "double", "caching"),
    [
        ("storage", True, NONE),
        ("storage", True, READ_ONLY),
        ("cache", True, READ_ONLY),
        ("cache", False, READ_ONLY),
    ],
)
def test_a_stage_that_keeps_all_writes_is_restarted_with_all_of_them(
    make: Make, name: str, double: bool, caching: HostCaching
) -> None:
    disk = make("raw", double=double, caching=caching)
    disk.start()
    assert "wrote 8192" in disk.guest_io("write -P 0x5a 4096 8192")
    kill(disk, name)
    (record,) = disk.stages.records()
    assert disk.stages.dead(record) == [name]
    assert "can't open" in disk.guest_io("read 0 512")
    disk.stages.restart(disk.disk.id, disk.deks)
    assert disk.stages.dead(record) == []
    assert "failed" not in disk.guest_io("read -P 0x5a 4096 8192")
    pids = disk.pids()
    disk.stages.restart(disk.disk.id, disk.deks)
    assert disk.pids() == pids
    disk.stop()
    disk.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("image_format", "double", "caching"),
    [("qcow2", True, NONE), ("raw", True, READ_WRITE), ("qcow2", False, READ_WRITE)],
)
def test_a_stage_that_may_have_lost_writes_is_not_restarted(
    make: Make, image_format: str, double: bool, caching: HostCaching
) -> None:
    disk = make(image_format, double=double, caching=caching)
    disk.start()
    name = "storage" if double else "cache"
    kill(disk, name)
    with pytest.raises(StageError, match="unflushed writes are lost"):
        disk.stages.restart(disk.disk.id, disk.deks)
    assert disk.process(name).pid() is None
    disk.start()
    assert "read 512/512" in disk.guest_io("read 0 512")


@pytest.mark.parametrize(
    ("caching", "victim"),
    [
        (NONE, "storage"),
        *((caching, name) for caching in (READ_ONLY, READ_WRITE) for name in ("storage", "cache")),
    ],
)
def test_flushed_data_survives_a_kill(make: Make, caching: HostCaching, victim: str) -> None:
    disk = make("qcow2", caching=caching)
    disk.start()
    assert "wrote 1048576" in disk.guest_io("write -P 0x5a 0 1M", "flush")
    kill(disk, victim)
    disk.start()
    assert "failed" not in disk.guest_io("read -P 0x5a 0 1M")
    disk.stop()
    disk.assert_nothing_is_left()


class TestGrowth:
    def test_a_raw_volume_grows_under_a_guest_that_reconnects(self, make: Make) -> None:
        disk = make("raw")
        disk.start()
        disk.stages.grow(disk.disk, 5 * M, reconnects=True)
        disk.stop()
        info = img.usable_size_within(disk.disk.path, disk.disk.format, list(disk.deks.values()))
        assert info == 5 * M

    def test_a_raw_volume_does_not_grow_under_a_guest_that_stays_connected(self, make: Make) -> None:
        disk = make("raw")
        disk.start()
        with pytest.raises(StageError, match="cannot grow under a running guest") as failure:
            disk.stages.grow(disk.disk, 5 * M, reconnects=False)
        assert "stop the domain first" in str(failure.value.hint)

    def test_a_qcow2_volume_has_room_to_grow(self, make: Make) -> None:
        disk = make("qcow2")
        disk.start()
        before = disk.daemon().sizes()
        disk.stages.grow(disk.disk, 2 * M, reconnects=False)
        assert disk.daemon().sizes() == before

    def test_a_volume_below_a_cache_does_not_grow(self, make: Make) -> None:
        disk = make("raw", caching=READ_ONLY)
        disk.start()
        with pytest.raises(StageError, match="host cache, which does not grow"):
            disk.stages.grow(disk.disk, 5 * M, reconnects=True)

    def test_a_disk_without_stages_does_not_grow_here(self, make: Make) -> None:
        disk = make("raw")
        disk.stages.grow(disk.disk, 5 * M, reconnects=False)
