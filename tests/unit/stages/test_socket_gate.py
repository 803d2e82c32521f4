"""The gate of a disk's NBD socket: no process but the domain's own QEMU gets a connection."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.domain_qemu import as_qemu
from support.processes import open_files
from support.stage_disks import DOMAIN, QEMU, M, StagedDisk, kill
from support.waiting import is_gone, wait_until
from virt_sse.config import Config
from virt_sse.libvirt.users import User
from virt_sse.model.layers import HostCaching
from virt_sse.stages.gate import lock_holder
from virt_sse.stages.locked_process import LockedProcess
from virt_sse.stages.record import RECORD_NAME, StageRecord
from virt_sse.verification.stage_evidence import StageEvidence
from virt_sse.verification.verdict import DiskVerdict

NONE, READ_ONLY, READ_WRITE = HostCaching
KINDS = [(True, NONE), (False, READ_ONLY), (False, READ_WRITE), (True, READ_WRITE)]
ESCAPED = ["setpriv", f"--reuid={QEMU.uid}", f"--regid={QEMU.gid}", "--clear-groups"]
CONNECT = """\
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.settimeout(30)
client.connect(sys.argv[1])
try: print(client.recv(8), flush=True)
except ConnectionResetError: print(b"")
if sys.argv[2:]: sys.stdin.read(1)
"""


@pytest.fixture
def config(folder: Path, user: User) -> Config:
    images.require("qemu-storage-daemon", "qemu-io", "nbdkit", "cryptsetup", "setpriv", "nbdcopy")
    return dataclasses.replace(Config.load(folder), storage_user=str(user.uid))


@pytest.fixture(params=KINDS, ids=lambda kind: f"{'double' if kind[0] else 'single'}-{kind[1].value}")
def disk(request: pytest.FixtureRequest, config: Config) -> Iterator[StagedDisk]:
    double, caching = request.param
    disk = StagedDisk(config, "raw", double=double, caching=caching)
    disk.start()
    yield disk
    disk.stop()
    disk.assert_nothing_is_left()


def gate(disk: StagedDisk) -> LockedProcess:
    return disk.process("gate")


def record(disk: StagedDisk) -> StageRecord:
    (found,) = disk.stages.records()
    return found


def greeting(disk: StagedDisk, within: list[str]) -> str:
    """What a client is sent when it connects to the guest's socket."""
    path = disk.stages.guest_socket(disk.disk.id)
    command = [*within, sys.executable, "-I", "-S", "-c", CONNECT, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def problems(disk: StagedDisk) -> list[str]:
    verdict = DiskVerdict("vda")
    StageEvidence(disk.stages).check(verdict, disk.disk, disk.plan, DOMAIN)
    return verdict.problems


def own_qemu(disk: StagedDisk) -> list[str]:
    return as_qemu(disk.config.qemu_pid_file("web"))


@contextlib.contextmanager
def running_qemu(disk: StagedDisk) -> Iterator[int]:
    """A QEMU of the domain with the disk open."""
    path = disk.stages.guest_socket(disk.disk.id)
    command = [*own_qemu(disk), sys.executable, "-I", "-S", "-c", CONNECT, str(path), "stay"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdout
        assert qemu.stdout.readline() == "b'NBDMAGIC'\n"
        yield qemu.pid
        qemu.communicate("\n")


def test_an_escaped_guest_neither_reads_nor_writes_before_the_start(disk: StagedDisk, tmp_path: Path) -> None:
    before = disk.disk.path.read_bytes()
    uri = f"nbd+unix:///{disk.disk.id}?socket={disk.stages.guest_socket(disk.disk.id)}"
    zeroes = tmp_path / "zeroes"
    zeroes.write_bytes(bytes(M))
    for arguments in (["nbdinfo", uri], ["nbdcopy", uri, "null:"], ["nbdcopy", str(zeroes), uri]):
        done = subprocess.run([*ESCAPED, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode != 0, done.stdout
    assert greeting(disk, ESCAPED) == "b''"
    assert greeting(disk, own_qemu(disk)) == "b'NBDMAGIC'"
    assert disk.disk.path.read_bytes() == before
    assert "wrote 4096" in disk.guest_io("write -P 0x5a 0 4096", "flush")


def test_an_escaped_guest_is_refused_while_the_domain_runs(disk: StagedDisk) -> None:
    with running_qemu(disk):
        assert greeting(disk, ESCAPED) == "b''"
        assert greeting(disk, []) == "b''", "QEMU may run as root"
    assert greeting(disk, ESCAPED) == "b''"


def nearest(disk: StagedDisk) -> LockedProcess:
    """The stage process next to the guest."""
    return disk.stages.processes(record(disk))[0].process


def test_gate_and_stage_process_share_no_descriptor(disk: StagedDisk) -> None:
    """Both are forks of one process: the stage process must not accept clients that the gate refuses."""

    def files(process: LockedProcess) -> set[str]:
        return {str(file) for file in open_files(process.pid()).values()}

    shared = files(gate(disk)) & files(nearest(disk))
    assert shared <= {"/dev/null", "anon_inode:seccomp notify"}
    assert any(name.startswith("socket:") for name in files(gate(disk)))


def test_waiting_connections_of_an_escaped_guest_do_not_stop_the_domain(disk: StagedDisk) -> None:
    path = disk.stages.guest_socket(disk.disk.id)
    flood = (
        "import socket, sys\n"
        "for number in range(100000):\n"
        "    client = socket.socket(socket.AF_UNIX)\n"
        "    client.connect(sys.argv[1])\n"
        "    if number == 20: print(flush=True)\n"
    )
    attack = subprocess.Popen(
        [*ESCAPED, sys.executable, "-I", "-S", "-c", flood, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert attack.stdout
        attack.stdout.readline()
        assert "wrote 512" in disk.guest_io("write 0 512")
        assert attack.poll() is None
    finally:
        attack.kill()
        attack.communicate()


def test_a_refused_process_is_reported_once(disk: StagedDisk) -> None:
    found = disk.stages.gate(record(disk))
    assert found
    assert found.refused() == []
    path = disk.stages.guest_socket(disk.disk.id)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert client.recv(1) == b""
    wait_until(found.refused, "the refusal is reported")
    assert found.refused() == [f"process {os.getpid()} of user 0, {str(Path('/proc/self/exe').readlink())!r}"]


class TestAKilledGate:
    def test_lets_no_one_in_and_is_replaced(self, disk: StagedDisk) -> None:
        with running_qemu(disk) as qemu:
            kill(disk, "gate")
            assert disk.stages.lacks_gate(record(disk))
            assert disk.stages.dead(record(disk)) == []
            assert problems(disk) == ["the gate of the disk's socket does not run"]
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(str(disk.stages.guest_socket(disk.disk.id)))
            pids = disk.pids()
            disk.stages.restart_gate(disk.disk.id)
            assert not disk.stages.lacks_gate(record(disk))
            assert disk.pids() == pids
            assert problems(disk) == []
            assert greeting(disk, ESCAPED) == "b''"
            assert not is_gone(qemu)
        assert "wrote 512" in disk.guest_io("write 0 512")

    def test_is_no_hindrance_to_a_start_or_an_end(self, disk: StagedDisk) -> None:
        kill(disk, "gate")
        disk.start()
        assert "wrote 512" in disk.guest_io("write 0 512")
        kill(disk, "gate")

    def test_in_the_middle_of_a_connection(self, disk: StagedDisk) -> None:
        """The gate is stopped between taking the client and handing it over, then killed."""
        path = disk.config.stage_directory / str(disk.disk.id) / "nbd"
        pid = gate(disk).pid()
        assert pid
        os.kill(pid, signal.SIGSTOP)
        with socket.socket(socket.AF_UNIX) as announcement:
            announcement.connect(str(path))  # the stage process waits in accept4(2)
            kill(disk, "gate")
            disk.stages.restart_gate(disk.disk.id)
        assert "wrote 512" in disk.guest_io("write 0 512")


def test_a_gate_ends_with_its_stage_process(disk: StagedDisk) -> None:
    pid = gate(disk).pid()
    assert pid
    kill(disk, disk.stages.processes(record(disk))[0].name)
    wait_until(lambda: gate(disk).pid() is None, "the gate has ended")


def test_a_restarted_stage_process_has_a_gate(config: Config) -> None:
    disk = StagedDisk(config, "raw")
    disk.start()
    kill(disk, "storage")
    disk.stages.restart(disk.disk.id, disk.deks)
    assert greeting(disk, ESCAPED) == "b''"
    assert "wrote 512" in disk.guest_io("write 0 512")
    kill(disk, "gate")
    disk.stages.grow(disk.disk, 5 * M, reconnects=True)
    assert greeting(disk, ESCAPED) == "b''"
    assert "wrote 512" in disk.guest_io("write 0 512")
    disk.stop()


def test_a_stage_process_from_before_the_gate_is_kept_and_gets_a_gate_when_it_is_restarted(
    config: Config,
) -> None:
    disk = StagedDisk(config, "raw")
    disk.start()
    before = dataclasses.replace(record(disk), gated=False)
    folder = config.stage_directory / str(disk.disk.id)
    disk.stages._end_processes(disk.disk.id, before)
    before.write(folder)
    disk.stages._start(before, disk.deks, size=0)
    assert gate(disk).pid() is None
    assert not disk.stages.lacks_gate(before)
    assert greeting(disk, ESCAPED) == "b'NBDMAGIC'"
    disk.stages.restart_gate(disk.disk.id)
    assert gate(disk).pid() is None
    kill(disk, "storage")
    disk.stages.restart(disk.disk.id, disk.deks)
    assert record(disk) == dataclasses.replace(before, gated=True)
    assert greeting(disk, ESCAPED) == "b''"
    disk.stages.stop_domain(DOMAIN)
    disk.assert_nothing_is_left()


def test_processes_with_a_damaged_record_end_with_the_domain_of_their_gate(
    disk: StagedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk.config.stage_directory / str(disk.disk.id) / RECORD_NAME
    disk.stages.stop_damaged("web", {disk.disk.id})
    assert gate(disk).pid(), "the record is sound"
    path.write_text("[]")
    disk.stages.stop_damaged("other", {disk.disk.id})
    assert gate(disk).pid(), "the gate admits a different domain"
    disk.stages.stop_damaged("web", ())
    disk.assert_nothing_is_left()
    assert f"ended the processes of disk {disk.disk.id}, domain web: damaged stage record" in caplog.text


def test_without_a_gate_the_definition_of_the_ended_domain_decides(config: Config) -> None:
    disk = StagedDisk(config, "raw")
    disk.start()
    (config.stage_directory / str(disk.disk.id) / RECORD_NAME).write_text("[]")
    kill(disk, "gate")
    disk.stages.stop_damaged("web", ())
    assert disk.pids()
    disk.stages.stop_damaged("web", {disk.disk.id})
    disk.assert_nothing_is_left()


def test_a_lock_for_reading_makes_no_process_the_domains_qemu(tmp_path: Path, user: User) -> None:
    path = tmp_path / "web.pid"
    assert lock_holder(str(path)) is None
    path.touch()
    assert lock_holder(str(path)) is None
    script = "import fcntl, sys; fcntl.lockf(file := open(sys.argv[1], sys.argv[2]), int(sys.argv[3]))"
    script += "; print(flush=True); sys.stdin.read()"
    for mode, lock in (("r", "5"), ("r+", "2")):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path), mode, lock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout
            holder.stdout.readline()
            assert lock_holder(str(path)) == (holder.pid if mode == "r+" else None)
            os.chown(path, user.uid, user.gid)
            assert lock_holder(str(path)) is None
            os.chown(path, 0, 0)
            holder.communicate()
