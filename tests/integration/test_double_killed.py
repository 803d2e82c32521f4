"""What serves a guest with double encryption is killed: what the guest has of it, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import libvirt
import pytest

from support.stage_site import CONFIG, StageSite, owner, stage_site_fixtures
from support.waiting import wait_until
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.model.disks import Disk

M = 1 << 20


running_site, site = stage_site_fixtures()


@contextlib.contextmanager
def configured(site: StageSite, text: str) -> Iterator[None]:
    """With *text* as the host's configuration."""
    path = site.host.root / "etc/virt-sse/config.toml"
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(CONFIG)


def kill_storage(site: StageSite, disk: Disk) -> None:
    pid = site.storage(disk).pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: site.storage(disk).pid() is None, "the storage daemon has ended")


class TestAStorageDaemonThatIsKilled:
    PAUSED = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def test_the_guest_is_paused_and_has_all_that_it_wrote_when_it_starts_again(
        self, site: StageSite
    ) -> None:
        disks = [site.disk("qcow2"), site.disk("raw", size=M)]
        guest = site.guest(*disks)
        site.start_paused(guest)
        for number in range(2):
            assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 900K 4096", disk=number)
            assert "error" not in site.qemu_io(guest, "flush", disk=number)
            kill_storage(site, disks[number])
            assert "Input/output error" in site.qemu_io(guest, "read 900K 4096", disk=number)
        for _ in range(2):  # to let it go on is to have it paused again
            site.virsh("resume", guest.name)
            wait_until(lambda: site.state(guest) == self.PAUSED, "the guest is paused", seconds=60)
        guest.destroy()
        assert site.left() == {}
        assert [owner(disk) for disk in disks] == [0, 0]
        site.start_paused(guest)
        for number in range(2):
            assert "failed" not in site.qemu_io(guest, "read -P 0x5a 900K 4096", disk=number)
        guest.destroy()
        for disk in disks:
            site.backend.disks.check(disk.name)

    def test_the_guest_gets_the_error_if_the_domain_is_so_defined(self, site: StageSite) -> None:
        disk = site.disk("raw", size=M)
        with configured(site, f'{CONFIG}[disks]\nio-errors = "report"\n'):
            element = site.virt_sse("disk", "xml", disk.name)
        guest = Guest(site.host, disk.name, acceleration=site.acceleration, disks=[element])
        guest.define()
        site.start_paused(guest)
        assert '"werror":"report","rerror":"report"' in "".join(site.qemu(guest).command)
        kill_storage(site, disk)
        assert "Input/output error" in site.qemu_io(guest, "write 0 512")


def hook_of(site: StageSite, event: str) -> int | None:
    """The process of ours that serves a hook's event."""
    for process in site.processes():
        with contextlib.suppress(OSError):
            if "virt_sse.hook" in "".join(process.command) and event in process.command:
                return process.pid
    return None


def kill_hook(
    site: StageSite,
    event: str,
    command: subprocess.Popen[str],
    reached: Callable[[], object] = lambda: True,
) -> None:
    """Kill the hook that *command* has libvirt run, once *reached* holds; unless it is over before."""
    pid = None
    while pid is None and command.poll() is None:
        pid = hook_of(site, event)
    if pid is not None:
        wait_until(reached, f"the hook's {event} has reached its point")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_serves_and_ends(site: StageSite, guest: Guest, disk: Disk) -> None:
    assert len(site.stage_processes()) == 1
    assert "read 512" in site.qemu_io(guest, "read 0 512")
    guest.destroy()
    assert site.left() == {}
    assert owner(disk) == 0


class TestKilledOnTheWay:
    @pytest.mark.parametrize("when", ["hook", "storage", "secret"])
    def test_a_killed_hook_of_a_start_leaves_nothing(self, site: StageSite, when: str) -> None:
        disk = site.disk("qcow2", size=M)
        guest = site.guest(disk)
        reached: dict[str, Callable[[], object]] = {
            "hook": lambda: True,
            "storage": lambda: site.storage(disk).pid(),
            "secret": site.secrets,
        }
        start = site.popen("virsh", "start", guest.name, "--paused")
        kill_hook(site, "prepare", start, reached[when])
        said, _ = start.communicate(timeout=60)
        if start.returncode:
            assert "hook" in said.lower()
            site.start_paused(guest)
        assert_serves_and_ends(site, guest, disk)

    def test_a_killed_hook_of_an_end_leaves_nothing(self, site: StageSite) -> None:
        disk = site.disk("qcow2", size=M)
        guest = site.guest(disk)
        for _ in range(10):
            site.start_paused(guest)
            stop = site.popen("virsh", "destroy", guest.name)
            kill_hook(site, "release", stop)
            stop.communicate(timeout=60)
            if site.left():  # else it was done already
                break
        else:
            pytest.fail("the hook is always faster")
        site.start_paused(guest)
        assert_serves_and_ends(site, guest, disk)

    def test_a_killed_qemu_leaves_nothing(self, site: StageSite) -> None:
        disk = site.disk("raw", size=M)
        guest = site.guest(disk)
        site.start_paused(guest)
        assert "wrote 4096" in site.qemu_io(guest, "write -P 0x5a 0 4096")
        os.kill(site.qemu(guest).pid, signal.SIGKILL)
        wait_until(
            lambda: not guest.is_active() and not site.left(), "the guest has ended and nothing is left"
        )
        assert owner(disk) == 0
        site.start_paused(guest)
        assert "failed" not in site.qemu_io(guest, "read -P 0x5a 0 4096")

    def test_a_killed_agent_neither_hinders_a_start_nor_ends_a_guest(self, site: StageSite) -> None:
        """While it serves a start, and under a guest."""
        disk = site.disk("qcow2", size=M)
        guest = site.guest(disk)
        with LabAgent(site.host) as agent:
            start = site.popen("virsh", "start", guest.name, "--paused")
            wait_until(lambda: site.backend.host.stages.record(disk.id), "the stages have a record")
            agent.kill()
            start.communicate(timeout=60)
            agent.start()
            if not guest.is_active():
                site.start_paused(guest)
            (before,) = site.stage_processes()
            agent.kill()
            assert site.stage_processes() == [before]
            assert "read 512" in site.qemu_io(guest, "read 0 512")
            agent.start()
            guest.destroy()
        assert site.left() == {}
        assert owner(disk) == 0
