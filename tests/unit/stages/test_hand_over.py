"""Two hosts' storage daemons and one image; a guest's QEMU on each host stays connected all the time."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.domain_qemu import as_qemu
from support.stage_disks import DOMAIN, StagedDisk
from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.domains.incoming import has_open_for_writing
from virt_sse.errors import DiskInUseError, StageError
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.model.layers import Placement
from virt_sse.qemu import image_file, img
from virt_sse.stages import Stages
from virt_sse.stages.hand_over import HOLDING, TAKING
from virt_sse.stages.hand_over_process import HandOverProcess
from virt_sse.stages.hand_overs import HandOvers


class Guest:
    """A QEMU process connected to a disk with placement ``storage``; it sends a request at a time."""

    def __init__(self, host: StagedDisk) -> None:
        export = plain_export(host.disk.id)
        server = f"file.server.type=unix,file.server.path={host.stages.guest_socket(host.disk.id)}"
        node = f"driver=raw,file.driver=nbd,{server},file.export={export}"
        self.process = subprocess.Popen(
            [
                *as_qemu(host.config.qemu_pid_file("web")),
                "qemu-io",
                "--image-opts",
                node,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """The answer to the oldest command without an answer."""
        assert self.process.stdout
        said = ""
        while not re.search(r"ops/sec\)\n$|failed.*\n$|error.*\n$", said):
            line = self.process.stdout.readline()
            assert line, said
            said += line
        assert "failed" not in said, said
        assert "error" not in said, said
        return said

    def io(self, command: str) -> str:
        self.send(command)
        return self.answer()


class Hosts:
    """The source :attr:`a` and the destination :attr:`b` of a migration."""

    def __init__(self, a: StagedDisk, b: StagedDisk) -> None:
        self.a, self.b = a, b
        self.guests: list[Guest] = []

    def guest(self, host: StagedDisk) -> Guest:
        self.guests.append(Guest(host))
        return self.guests[-1]

    @staticmethod
    def hand_over(host: StagedDisk) -> HandOverProcess:
        (record,) = host.stages.records()
        found = host.stages.hand_over(record)
        assert found
        return found

    def await_state(self, host: StagedDisk, state: str | None) -> None:
        wait_until(lambda: self.hand_over(host).state == state, f"the hand-over is {state}")

    def writers(self) -> list[int]:
        """The processes with the image open for writing."""
        pids = [pid for host in (self.a, self.b) for pid in host.pids()]
        return [pid for pid in pids if has_open_for_writing(pid, self.a.disk.path)]

    def arrive(self) -> Guest:
        """The guest's QEMU at the destination has started, and waits for the guest."""
        self.b.start(is_elsewhere=True)
        guest = self.guest(self.b)
        guest.io("read 0 512")
        HandOvers(self.b.stages).expect_guest(DOMAIN)
        return guest

    def kill_hand_over(self, host: StagedDisk) -> None:
        process = self.hand_over(host).process
        pid = process.pid()
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process.pid() is None, "the hand-over's process has ended")

    def assert_direct(self, host: StagedDisk) -> None:
        """Nothing but the daemon is between the guest and the image, and no DEK is left in the daemon."""
        self.await_state(host, None)
        wait_until(lambda: self.hand_over(host).process.pid() is None, "the hand-over's process has ended")
        nodes, _, exports = host.daemon().block_graph()
        assert {node["node-name"] for node in nodes} == {"file", "volume", "volume1", "exported"}
        assert not any(node["ro"] for node in nodes)
        assert [each["id"] for each in exports] == ["disk"]
        assert host.disk.path.stat().st_uid == 0
        (writer,) = self.writers()
        assert writer == host.process("storage").pid()


@pytest.fixture
def image_format() -> str:
    return "raw"  # which two daemons could write at the same time


@pytest.fixture
def hosts(image_format: str, folder: Path, as_root: None) -> Iterator[Hosts]:
    images.require("qemu-storage-daemon", "qemu-io", "qemu-img", "cryptsetup")
    for name in "ab":
        (folder / name).mkdir()
    a = StagedDisk(Config.load(folder / "a"), image_format, placement=Placement.STORAGE)
    b = copy.copy(a)
    b.config = Config.load(folder / "b")
    b.stages = Stages(b.config)
    hosts = Hosts(a, b)
    a.start()
    yield hosts
    for guest in hosts.guests:
        guest.process.kill()
        guest.process.communicate()
    for host in (a, b):
        host.stop()
    for host in (a, b):
        host.assert_nothing_is_left()
    if image_format == "qcow2":
        img.check(a.disk.path, a.disk.format, list(a.deks.values()))


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_a_guest_that_arrives_waits_until_the_source_has_closed_the_image(hosts: Hosts) -> None:
    at_a = hosts.guest(hosts.a)
    at_a.io("write -P 0x11 0 64k")
    at_b = hosts.arrive()
    at_a.io("write -P 0x22 256k 64k")  # of which the destination's view knew nothing
    at_a.io("write -P 0x33 0 4k")
    at_b.send("read -P 0x22 256k 64k")
    hosts.await_state(hosts.b, TAKING)
    assert hosts.writers() == [hosts.a.process("storage").pid()]
    at_a.io("write -P 0x44 512k 4k")
    assert HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks)
    assert "Pattern" not in at_b.answer()
    hosts.assert_direct(hosts.b)
    for pattern, place in ((0x11, "4k 60k"), (0x33, "0 4k"), (0x44, "512k 4k")):
        assert "Pattern" not in at_b.io(f"read -P {pattern} {place}")
    at_a.process.kill()
    hosts.a.stop()
    at_b.io("write -P 0x55 768k 4k")
    back = hosts.b
    hosts.a, hosts.b = hosts.b, hosts.a
    at_a = hosts.arrive()
    at_a.send("read -P 0x55 768k 4k")
    assert HandOvers(back.stages).leave(back.disk.id, back.deks)
    assert "Pattern" not in at_a.answer()
    hosts.assert_direct(hosts.b)


@pytest.mark.parametrize("image_format", ["qcow2"])
def test_a_guest_that_stays_takes_the_image_back(hosts: Hosts) -> None:
    at_a = hosts.guest(hosts.a)
    hosts.arrive()
    at_a.io("write -P 0x11 0 64k")
    assert HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks)
    assert not HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks), "a second time"
    hosts.await_state(hosts.a, HOLDING)
    assert hosts.writers() == []
    hosts.guests[-1].process.kill()
    hosts.b.stop()
    assert "Pattern" not in at_a.io("read -P 0x11 0 64k")
    hosts.assert_direct(hosts.a)
    at_a.io("write -P 0x22 0 64k")


def test_a_guest_that_sends_nothing_has_its_image_in_use(hosts: Hosts) -> None:
    hosts.guest(hosts.a)
    HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks)
    hosts.await_state(hosts.a, HOLDING)
    with pytest.raises(DiskInUseError):
        image_file.refuse_if_open(hosts.a.disk.path)
    (record,) = hosts.a.stages.records()
    HandOvers(hosts.a.stages).take(record, before=0)
    assert hosts.hand_over(hosts.a).state == HOLDING
    HandOvers(hosts.a.stages).take(record, before=time.time() + 1)
    hosts.assert_direct(hosts.a)


def test_of_two_guests_that_run_at_the_same_time_one_writes(hosts: Hosts) -> None:
    at_a = hosts.guest(hosts.a)
    at_b = hosts.arrive()
    HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks)
    at_a.send("write -P 0x11 0 64k")
    at_b.send("write -P 0x22 0 64k")
    states = lambda: [hosts.hand_over(host).state for host in (hosts.a, hosts.b)]  # noqa: E731
    wait_until(lambda: sorted(map(str, states())) == ["None", TAKING], "one host has the image")
    first, second = (hosts.a, hosts.b) if states()[0] is None else (hosts.b, hosts.a)
    assert hosts.writers() == [first.process("storage").pid()]
    (at_a if first is hosts.a else at_b).answer()
    with pytest.raises(DiskInUseError):
        second.start()
    first.stop()


@pytest.mark.parametrize("state", [HOLDING, TAKING])
def test_a_killed_hand_over_is_replaced(hosts: Hosts, state: str) -> None:
    at_a = hosts.guest(hosts.a)
    at_b = hosts.arrive()
    at_a.io("write -P 0x11 0 64k")
    if state == TAKING:
        at_b.send("read -P 0x11 0 64k")
    hosts.await_state(hosts.b, state)
    hosts.kill_hand_over(hosts.b)
    (record,) = hosts.b.stages.records()
    assert HandOvers(hosts.b.stages).is_dead(record)
    HandOvers(hosts.b.stages).restart(hosts.b.disk.id)
    HandOvers(hosts.a.stages).leave(hosts.a.disk.id, hosts.a.deks)
    if state == HOLDING:
        at_b.send("read -P 0x11 0 64k")
    assert "Pattern" not in at_b.answer()
    hosts.assert_direct(hosts.b)


def test_a_hand_over_killed_before_the_guest_comes_ends_the_migration(hosts: Hosts) -> None:
    hosts.b.start(is_elsewhere=True)
    hosts.kill_hand_over(hosts.b)
    with pytest.raises(StageError, match="the hand-over of a disk has failed"):
        HandOvers(hosts.b.stages).expect_guest(DOMAIN)
