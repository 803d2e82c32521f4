"""Migrations of a writing guest during which a process of either host is killed.

The guest checks the checksums of its blocks all the time. At most one process of QEMU at a time, a guest's or
a storage daemon, may have the image open for writing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import libvirt

from support.migration_site import MigrationHost, MigrationSite, MovingGuest
from support.waiting import wait_until
from virt_sse.domains.incoming import has_open_for_writing
from virt_sse.model.disks import Disk

_LONGEST_DELAY = 3.0
_VICTIMS = ("agent", "libvirtd", "qemu")
_BELOW = {"storage": b"qemu-storage-daemon\0", "hand-over": b"/stages/hand_over.py\0"}
"""Processes of a disk with a storage daemon, by their command line."""
_OPTIONS = ((), ("--p2p",), ("--p2p", "--persistent"))
_SETTLE_SECONDS = 60
_MOST_HELP = 3
_LEASE_SECONDS = 200
"""The agent keeps the leases of a domain without a process for two minutes."""


@dataclass(frozen=True, slots=True)
class MigrationKill:
    """A process to kill during a migration.

    :ivar side: ``source`` or ``target``.
    :ivar delay: seconds after the begin of the migration.
    """

    side: str
    process: str
    delay: float
    options: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.side}-{self.process}-{self.delay:g}"

    @classmethod
    def choose(cls, seed: int, *, has_daemon: bool) -> MigrationKill:
        chance = Random(f"migration:{seed}")  # noqa: S311 -- a seed
        return cls(
            chance.choice(("source", "target")),
            chance.choice((*_VICTIMS, *_BELOW) if has_daemon else _VICTIMS),
            round(chance.uniform(0, _LONGEST_DELAY), 3),
            chance.choice(_OPTIONS),
        )


class MigrationKills:
    """A writing guest on one of the two hosts.

    :ivar here: the host with the guest.
    :ivar there: the other host.
    :ivar has_daemon: whether a storage daemon has the disk's image open.
    """

    def __init__(self, site: MigrationSite, guest: MovingGuest, disk: Disk) -> None:
        self.site, self.guest, self.disk = site, guest, disk
        self._usages = site.a.secrets()
        self.has_daemon = bool(site.a.backend.host.stages.records())
        self.here, self.there = site.a, site.b

    def move(self, *options: str) -> None:
        """Migrate the guest to the other host, without a kill."""
        with self._watched():
            self.site.migrate(self.guest, self.here, self.there, *options)
        self.here, self.there = self.there, self.here
        self.check()

    def rotate(self) -> None:
        """Rotate the key of the disk's set, on the guest's host."""
        sets = (self.site.set, self.site.double, self.site.placed_below)
        own = next(each for each in sets if each.id == self.disk.set_id)
        self.site.keys.rotate(own.key.name)
        self.here.virt_sse("des", "rotate", own.name)

    def attempt(self, kill: MigrationKill) -> str:
        """Kill a process during a migration, and start it again. Returns what became of the guest."""
        source, target = self.here, self.there
        serial = self.site.serial(self.guest, target)
        command = self.site.command(self.guest, source, target, *kill.options, serial=serial)
        victim = source if kill.side == "source" else target
        with self._watched():
            with subprocess.Popen(
                command, env=source.host.environment, stderr=subprocess.PIPE, text=True
            ) as running:
                time.sleep(kill.delay)
                self._kill(victim, kill.process)
                self._restart(victim, kill.process)
                running.communicate(timeout=120)
            result = self._settle(source, target, serial)
        self.check()
        return result

    def check(self) -> None:
        """The guest writes on; keys, leases and processes are on its host alone."""
        self.guest.await_writes()
        usages = self._usages
        here, there = self.here, self.there
        wait_until(lambda: here.secrets() == usages, "the guest's host has the key", seconds=_SETTLE_SECONDS)
        wait_until(lambda: there.secrets() == [], "the other host has no key", seconds=_SETTLE_SECONDS)
        wait_until(
            lambda: not there.backend.host.stages.records(),
            "the other host has no storage daemon",
            seconds=_SETTLE_SECONDS,
        )
        wait_until(lambda: there.leases() == [], "the other host has no lease", seconds=_LEASE_SECONDS)
        wait_until(lambda: self.disk.id in here.leases(), "the guest's host has the lease")
        assert self._qemus(there) == []
        assert len(self._qemus(here)) == 1

    def _settle(self, source: MigrationHost, target: MigrationHost, serial: Path) -> str:
        """Wait until at most one host has the domain; end a second, paused one as an operator would."""

        def states() -> tuple[int | None, int | None]:
            return source.state(self.guest), target.state(self.guest)

        began, running, times = time.monotonic(), libvirt.VIR_DOMAIN_RUNNING, 0
        while states() not in ((running, None), (None, running), (None, None)):
            if time.monotonic() - began > 10:
                self._help(source, target, *states(), is_last=times == _MOST_HELP)
                began, times = time.monotonic(), times + 1
            time.sleep(0.05)
        at_source, at_target = states()
        if at_target is not None:
            self.guest.move(target.host, serial)
            self.here, self.there = target, source
            return "moved"
        if at_source is not None:
            return "stayed"
        self.guest.check()
        for each in (source, target):
            wait_until(
                lambda each=each: not each.leases(), "the leases are given back", seconds=_LEASE_SECONDS
            )
        self.guest.restart(source, self.site.serial(self.guest, source))
        return "restarted"

    def _help(
        self,
        source: MigrationHost,
        target: MigrationHost,
        at_source: int | None,
        at_target: int | None,
        *,
        is_last: bool,
    ) -> None:
        """What an operator does with a domain that libvirt leaves paused after a lost connection.

        :param is_last: a domain that does not go on is ended: a killed storage daemon has lost the metadata
            of a qcow2 image.
        """
        running = libvirt.VIR_DOMAIN_RUNNING
        if is_last:
            for each in (source, target):
                each.host.virsh("destroy", self.guest.name, check=False)
        elif at_target == running and at_source is not None:
            source.host.virsh("destroy", self.guest.name, check=False)
        elif at_source == running and at_target is not None:
            target.host.virsh("destroy", self.guest.name, check=False)
        elif at_target is None:
            source.host.virsh("resume", self.guest.name, check=False)
        else:
            target.host.virsh("destroy", self.guest.name, check=False)

    def _kill(self, victim: MigrationHost, process: str) -> None:
        if process == "agent":
            victim.agent.kill()
        elif process == "libvirtd":
            victim.host.run(["sh", "-c", "kill -KILL $(cat /run/libvirt/libvirtd.pid)"])
        else:
            below = _BELOW.get(process)
            for pid in self._processes(victim, below) if below else self._qemus(victim):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _restart(self, victim: MigrationHost, process: str) -> None:
        if process == "agent":
            victim.agent.start()
        elif process == "libvirtd":
            victim.host.restart_libvirtd()

    def _qemus(self, host: MigrationHost) -> list[int]:
        """The guest's QEMU processes on a host."""
        return self._processes(host, f"guest={self.guest.name},".encode())

    @staticmethod
    def _processes(host: MigrationHost, argument: bytes) -> list[int]:
        """Processes of a host by a part of their command line; their numbers out here."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and argument in (entry / "cmdline").read_bytes():
                    is_here = str((entry / "ns/pid").readlink()) == host.pid_namespace
                    found += [int(entry.name)] if is_here else []
        return found

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Check all the time that at most one QEMU process has the image open for writing."""
        stop, found = threading.Event(), []

        def watch() -> None:
            while not stop.is_set():
                daemon = _BELOW["storage"]
                writers = [
                    pid
                    for host in (self.here, self.there)
                    for pid in (*self._qemus(host), *self._processes(host, daemon))
                    if self._writes(pid)
                ]
                time.sleep(0.01)
                if len(writers) > 1 and all(self._writes(pid) for pid in writers):
                    found.append(writers)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not found, f"QEMU processes that write at the same time: {found}"

    def _writes(self, pid: int) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return has_open_for_writing(pid, self.disk.path)
        return False
