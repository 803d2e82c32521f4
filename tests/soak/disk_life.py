"""Lives of disks with a kill in each step: of the command, the agent, the guest's QEMU, or all three."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from random import Random

from support.agent_site import CustomerSite
from support.disk_contents import decrypted
from support.disk_life import DiskLife, Step
from support.stage_site import Running
from support.waiting import is_gone, wait_until
from support.writing_guest import newest_block
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disks import Disk, DiskState

_RATE = "4M"
_LONGEST = {
    "encrypt": 3.5,
    "associate": 1.2,
    "snapshot": 2.2,
    "rotate": 1.5,
    "reencrypt": 4.0,
    "backup": 2.2,
    "increment": 2.2,
    "restore-snapshot": 1.5,
}
"""Seconds from the begin of a step to the latest kill: about its duration on two busy processors."""
_NO_AGENT = "no agent answers"
_PROCESSES = ("command", "command", "command", "qemu", "agent", "all")


@dataclass(frozen=True, slots=True)
class LifeKill:
    """A kill in a step.

    :ivar process: ``command``, ``qemu``, ``agent`` or ``all``. A re-encryption is the agent's if ``agent``.
    :ivar delay: seconds between the begin of the command and the kill.
    :ivar starts: whether a domain whose QEMU was killed starts before the next command.
    """

    step: str
    process: str
    delay: float
    starts: bool

    def __str__(self) -> str:
        return f"{self.step}-{self.process}-{self.delay:g}{'-starts' if self.starts else ''}"

    @classmethod
    def choose(cls, step: str, seed: int) -> LifeKill:
        chance = Random(f"{step}:{seed}")  # noqa: S311 -- a seed
        process = chance.choice(_PROCESSES)
        delay = round(chance.uniform(0.1, _LONGEST[step]), 3)
        return cls(step, process, delay, chance.random() < 0.5)


class KilledLife:
    """A life with a kill in each step."""

    def __init__(self, site: CustomerSite, linux: Acceleration, boot: LinuxMicro, seed: int) -> None:
        self._site = site
        self._life = DiskLife(site, linux, boot)
        self._stages = self._life.stages
        self._guest = self._life.guest
        self._seed = seed
        self._killed_qemu = 0

    def play(self) -> None:
        """Play all steps.

        :raise AssertionError: When a kill has lost or left something; a note names the kill.
        """
        self._guest.run()
        self._guest.await_writes()
        for step in self._life.steps(rate=_RATE):
            kill = LifeKill.choose(step.name, self._seed)
            try:
                found = self._kill_in(step, kill)
                sys.stdout.write(f"{kill}: {found}\n")
            except Exception as exc:
                exc.add_note(f"after {kill}, seed {self._seed}")
                raise
        found = [decrypted(self._site.backend, disk) for disk in self._copies()]
        first, last, again = map(newest_block, found)
        assert first == again < last <= self._guest.acknowledged
        self._life.end()

    def _copies(self) -> list[Disk]:
        backend, life = self._site.backend, self._life
        return [backend.disks.get(life.snapshot), life.points()[-1], backend.disks.get(life.second)]

    def _kill_in(self, step: Step, kill: LifeKill) -> str:
        """Kill a process in a step, and finish the step: what the next command found."""
        step.prepare()
        arguments = step.arguments
        if kill.process == "agent" and step.name == "reencrypt":
            arguments = (*arguments, "--detach")
        job = self._stages.popen("virt-sse", *arguments)
        time.sleep(kill.delay)
        self._kill(kill, step)
        said, _ = job.communicate(timeout=180)
        assert "Traceback" not in said, said
        if kill.process in ("agent", "all"):
            self._site.agent.start()
        if kill.process == "agent" and step.name == "reencrypt" and _NO_AGENT in said:
            assert job.returncode == 1, said  # killed before the command asked the agent
        elif kill.process == "agent":
            assert job.returncode == 0, said
            if step.name == "reencrypt":
                wait_until(step.is_done, "the agent has re-encrypted the disk", seconds=60)
        if kill.process in ("qemu", "all") and kill.starts:
            self._start_again()
        self._stages.virt_sse("disk", "list")
        self._check()
        outcome = "done" if step.is_done() else "undone"
        if job.returncode == 0:
            outcome += ", not disturbed"
        if not step.is_done():
            self._stages.virt_sse(*step.arguments)
            self._check()
        assert step.is_done()
        if not self._guest.is_active():
            self._start_again()
        self._check()
        self._guest.await_writes()
        return outcome

    def _kill(self, kill: LifeKill, step: Step) -> None:
        if kill.process in ("command", "all"):
            words = list(map(str, step.arguments[:3]))
            for process in self._stages.processes():
                with contextlib.suppress(OSError):
                    if _has(process, words):
                        os.kill(process.pid, signal.SIGKILL)
        if kill.process in ("qemu", "all"):
            with contextlib.suppress(ProcessLookupError):
                self._killed_qemu = self._stages.qemu(self._guest).pid
                os.kill(self._killed_qemu, signal.SIGKILL)
        if kill.process in ("agent", "all"):
            self._site.agent.kill()

    def _start_again(self) -> None:
        # A process ends only after the writes that the kernel does for the process: long on a busy disk.
        wait_until(lambda: is_gone(self._killed_qemu), "the killed QEMU has ended", seconds=120)
        wait_until(lambda: not self._guest.is_active(), "libvirt knows of the end of QEMU", seconds=60)
        self._guest.run()

    def _check(self) -> None:
        """Check the host once a command has recovered."""
        life, backend = self._life, self._site.backend
        disks = [disk for disk in backend.host.store.all() if disk.name.startswith(life.name)]
        assert [disk.name for disk in disks if disk.state is not DiskState.READY] == []
        assert [disk.name for disk in disks if ".copy-" in disk.name] == []
        kept = {disk.path for disk in disks} | {life.plain}
        mine = [*life.plain.parent.glob(f"*{life.name}*"), *life.plain.parent.glob(".*")]
        assert {path for path in mine if path not in kept} == set()
        points = life.points()
        names = {name for point in points for name in (point.path.name, f"{point.path.name}.json")}
        assert {path.name for path in life.folder.iterdir()} == names
        if self._guest.is_active():
            assert self._stages.virsh("domstate", life.name).strip() == "running"
            self._guest.check()
            used = {disk.id for disk in disks if disk.name == life.disk}
            found = {secret.split(":")[1] for secret in self._stages.secrets()}
            if self._has_our_disk():
                assert found == {str(each) for each in used}
                self._stages.virt_sse("vm", "verify", life.name)

    def _has_our_disk(self) -> bool:
        return "virt-sse:" in self._stages.virsh("dumpxml", self._life.name)


def _has(process: Running, words: list[str]) -> bool:
    """Whether *words* follow each other in the command line of a process of virt-sse."""
    command = process.command
    return any(command[number : number + len(words)] == words for number in range(len(command)))
