"""Starts and ends of a domain during which a process is killed.

The domain has a disk with one layer, a double disk and a cached disk, each with the same data.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from support.stage_site import Running, StageSite, owner
from support.waiting import wait_until
from virt_sse.domains.settings import VmChanges
from virt_sse.lab.agents import LabAgent
from virt_sse.model.layers import HostCaching

M = 1 << 20
PROCESSES = {
    "client": "virsh",
    "hook": "virt_sse.hook",
    "agent": "run",
    "storage": "qemu-storage-daemon",
    "cache": "nbdkit",
    "gate": "gate",
    "qemu": "guest=",
    "libvirtd": "libvirtd",
}
"""Processes to kill, with a part of the command line."""
ACTIONS = ("start", "destroy")
_LONGEST_DELAY = 0.6


@dataclass(frozen=True, slots=True)
class DomainKill:
    """A process to kill in an action of virsh.

    :ivar delay: seconds between the appearance of the process and the kill.
    """

    action: str
    process: str
    delay: float

    def __str__(self) -> str:
        return f"{self.action}-{self.process}-{self.delay:g}"

    @classmethod
    def choose(cls, action: str, process: str, seed: int) -> DomainKill:
        chance = Random(f"{action}:{process}:{seed}")  # noqa: S311 -- a seed
        return cls(action, process, round(chance.uniform(0, _LONGEST_DELAY), 3))


class DomainSite:
    """A domain on a lab host."""

    def __init__(self, site: StageSite) -> None:
        self._site = site
        self.disks = [site.single_disk(size=M), site.disk(size=M), site.single_disk(size=M)]
        self.guest = site.guest(*self.disks)
        changes = VmChanges(encryption_at_host=True, caching={"vdc": HostCaching.READ_WRITE})
        site.backend.vms.update(self.guest.name, changes)
        site.start_paused(self.guest)
        for number in range(len(self.disks)):
            assert "wrote 4096" in site.qemu_io(self.guest, "write -P 0x5a 0 4096", disk=number)
            site.qemu_io(self.guest, "flush", disk=number)
        site.virsh("destroy", self.guest.name)
        self.check_stopped()

    def attempt(self, kill: DomainKill) -> bool:
        """Kill a process, recover, and check domain and host. Returns whether the process was killed.

        The hook is killed without an agent: with an agent, the agent does the hook's work.
        """
        site, name = self._site, self.guest.name
        with contextlib.ExitStack() as stack:
            agent = LabAgent(site.host)
            if kill.process != "hook":
                stack.enter_context(agent)
            if kill.action == "destroy":
                site.start_paused(self.guest)
            options = ["--paused"] if kill.action == "start" else []
            action = site.popen("virsh", kill.action, name, *options)
            killed = self._kill(kill, action, agent)
            said, _ = action.communicate(timeout=60)
            assert "Traceback" not in said, said
        if kill.process == "libvirtd":
            site.host.restart_libvirtd()
        with LabAgent(site.host):
            if "running" in (state := site.virsh("domstate", name)) or "paused" in state:
                site.virsh("destroy", name)
            wait_until(lambda: not site.left(), f"nothing is left after {kill}")
            self.check_stopped()
            site.start_paused(self.guest)
            for number in range(len(self.disks)):
                read = site.qemu_io(self.guest, "read -P 0x5a 0 4096", disk=number)
                assert "read 4096" in read, read
                assert "failed" not in read, read
            site.virsh("destroy", name)
            self.check_stopped()
        return killed

    def check_stopped(self) -> None:
        """Check that the host has nothing of the stopped domain but the images."""
        assert self._site.left() == {}
        assert [owner(disk) for disk in self.disks] == [0] * len(self.disks)
        for disk in self.disks:
            self._site.backend.disks.check(disk.name)

    def _kill(self, kill: DomainKill, action: subprocess.Popen[str], agent: LabAgent) -> bool:
        """Wait for the process while the action runs, and kill the process after the delay."""
        while not (found := self._find(kill.process)):
            if action.poll() is not None:
                return False
            time.sleep(0.005)
        time.sleep(kill.delay)
        if kill.process == "agent":
            agent.kill()
            return True
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)
            return True
        return False

    def _find(self, process: str) -> Running | None:
        part = PROCESSES[process]
        for running in self._site.processes():
            with contextlib.suppress(OSError):
                if any(word.startswith(part) or Path(word).name.startswith(part) for word in running.command):
                    return running
        return None
