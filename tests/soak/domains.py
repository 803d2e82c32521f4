"""Starts, changes and ends of a domain during which a process is killed.

The domain has a disk with one layer, a double disk and a cached disk, each with the same data. Another double
disk with the same data is attached and detached.
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
from virt_sse.model.disks import Disk
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
"""Processes to kill, with a part of the command line; the client is ``virsh``, or a command of virt-sse."""
_PLUGGING = ("client", "agent", "storage", "cache", "gate", "qemu", "libvirtd")
ACTIONS = {
    "start": tuple(PROCESSES),
    "destroy": tuple(PROCESSES),
    "attach": _PLUGGING,
    "detach": _PLUGGING,
    "update": ("client", "agent", "libvirtd"),
}
"""Actions, with the processes to kill. A disk is attached to and detached from the running domain."""
_LONGEST_DELAYS = {"start": 0.6, "destroy": 0.6, "attach": 1.5, "detach": 1.5, "update": 1.5}


@dataclass(frozen=True, slots=True)
class DomainKill:
    """A process to kill in an action.

    :ivar delay: seconds between the appearance of the process and the kill.
    :ivar repeats: repeat an attach or a detach while the domain runs.
    """

    action: str
    process: str
    delay: float
    repeats: bool = False

    def __str__(self) -> str:
        return f"{self.action}-{self.process}-{self.delay:g}"

    @classmethod
    def choose(cls, action: str, process: str, seed: int) -> DomainKill:
        chance = Random(f"{action}:{process}:{seed}")  # noqa: S311 -- a seed
        delay = round(chance.uniform(0, _LONGEST_DELAYS[action]), 3)
        return cls(action, process, delay, chance.random() < 0.5)


class DomainSite:
    """A domain on a lab host."""

    def __init__(self, site: StageSite) -> None:
        self._site = site
        self.disks = [site.single_disk(size=M), site.disk(size=M), site.single_disk(size=M)]
        self.extra = site.disk(size=M)
        self.guest = site.guest(*self.disks)
        changes = VmChanges(encryption_at_host=True, caching={"vdc": HostCaching.READ_WRITE})
        site.backend.vms.update(self.guest.name, changes)
        site.virt_sse("disk", "attach", self.extra.name, self.guest.name)
        site.start_paused(self.guest)
        for number in range(len(self.disks) + 1):
            assert "wrote 4096" in site.qemu_io(self.guest, "write -P 0x5a 0 4096", disk=number)
            site.qemu_io(self.guest, "flush", disk=number)
        site.virsh("destroy", self.guest.name)
        site.virt_sse("disk", "detach", self.extra.name, self.guest.name)
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
            if kill.action in ("destroy", "attach", "detach"):
                site.start_paused(self.guest)
            if kill.action == "detach":
                site.virt_sse("disk", "attach", self.extra.name, name)
            action = site.popen(*self._command(kill.action))
            killed = self._kill(kill, action, agent)
            said, _ = action.communicate(timeout=300)
            assert "Traceback" not in said, said
        if kill.process == "libvirtd":
            site.host.restart_libvirtd()
        with LabAgent(site.host):
            if self._is_active():
                if kill.repeats and kill.action == "attach":
                    self._plug("attach", "is attached to")
                if kill.repeats and kill.action == "detach":
                    self._plug("detach", "does not have disk", "did not release disk")
            if self._is_active():
                site.virsh("destroy", name)
            wait_until(lambda: not site.left(), f"nothing is left after {kill}", seconds=60)
            self.check_stopped()
            if kill.action == "update":
                self._update()
            if kill.action == "detach":
                self._plug("detach", "does not have disk")
            if kill.action in ("attach", "detach"):
                self._plug("attach", "is attached to")
            self._check_data(self.disks if kill.action not in ("attach", "detach") else self._all)
            if kill.action in ("attach", "detach"):
                site.virt_sse("disk", "detach", self.extra.name, name)
            self.check_stopped()
        return killed

    @property
    def _all(self) -> list[Disk]:
        return [*self.disks, self.extra]

    def _is_active(self) -> bool:
        state = self._site.virsh("domstate", self.guest.name)
        return "running" in state or "paused" in state

    def _command(self, action: str) -> list[str]:
        name = self.guest.name
        return {
            "start": ["virsh", "start", name, "--paused"],
            "destroy": ["virsh", "destroy", name],
            "attach": ["virt-sse", "disk", "attach", self.extra.name, name],
            "detach": ["virt-sse", "disk", "detach", self.extra.name, name],
            "update": ["virt-sse", "vm", "update", name, "--disk-caching", "vda=ReadOnly"],
        }[action]

    def _plug(self, action: str, *refusals: str) -> None:
        """Repeat an attach or a detach: succeeds, or is refused with one of *refusals*."""
        repeated = self._site.popen(*self._command(action))
        said, _ = repeated.communicate(timeout=300)
        assert repeated.returncode == 0 or any(refusal in said for refusal in refusals), said
        assert "Traceback" not in said, said

    def _update(self) -> None:
        """Repeat the update, and take the update back; store and definition agree each time."""
        for caching in (HostCaching.READ_ONLY, HostCaching.NONE):
            target = f"vda={caching.value}"
            self._site.virt_sse("vm", "update", self.guest.name, "--disk-caching", target)
            view = self._site.backend.vms.show(self.guest.name)
            assert view.problem is None, view.problem
            assert view.disks["vda"].caching is caching
            assert view.disks["vdc"].caching is HostCaching.READ_WRITE
            assert view.properties.encryption_at_host

    def _check_data(self, disks: list[Disk]) -> None:
        """Start the domain, read from each disk, and end the domain."""
        site = self._site
        site.start_paused(self.guest)
        for number in range(len(disks)):
            read = site.qemu_io(self.guest, "read -P 0x5a 0 4096", disk=number)
            assert "read 4096" in read, read
            assert "failed" not in read, read
        site.virsh("destroy", self.guest.name)
        self.check_stopped()

    def check_stopped(self) -> None:
        """Check that the host has nothing of the stopped domain but the images."""
        assert self._site.left() == {}
        assert [owner(disk) for disk in self._all] == [0] * len(self._all)
        for disk in self._all:
            self._site.backend.disks.check(disk.name)

    def _kill(self, kill: DomainKill, action: subprocess.Popen[str], agent: LabAgent) -> bool:
        """Wait for the process while the action runs, and kill the process after the delay."""
        part = PROCESSES[kill.process]
        if kill.process == "client":
            part = "virsh" if kill.action in ("start", "destroy") else kill.action
        while not (found := self._find(part)):
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

    def _find(self, part: str) -> Running | None:
        for running in self._site.processes():
            with contextlib.suppress(OSError):
                if any(word.startswith(part) or Path(word).name.startswith(part) for word in running.command):
                    return running
        return None
