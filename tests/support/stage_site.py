"""A lab host for guests whose disks have stages, and a list of leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt_qemu
import pytest

from support.agent_site import forget_domains, prepared, secret_usages
from support.lab_operator import typing_environment
from support.loaded_commands import run_command
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import EncryptionType
from virt_sse.stages.locked_process import LockedProcess

CONFIG = """\
[agent]
poll-seconds = 0.2
"""
_STAGE_PROGRAMS = {"qemu-storage-daemon", "nbdkit"}


@dataclass(frozen=True, slots=True)
class Running:
    """A process of a lab host, by its number out here."""

    pid: int

    @property
    def command(self) -> list[str]:
        """The command line; empty once the process has ended."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
        except (FileNotFoundError, ProcessLookupError):
            return []

    @property
    def uid(self) -> int:
        return os.stat(f"/proc/{self.pid}").st_uid  # noqa: PTH116 -- of the folder itself


class StageSite:
    """A lab host with an encryption set for double encryption.

    :ivar backend: the host's backend outside of the host's namespaces; must not start or end processes.
    """

    def __init__(self, host: LabHost, backend: Backend, acceleration: Acceleration) -> None:
        self.host = host
        self.backend = backend
        self.acceleration = acceleration
        self.set = f"double-{uuid.uuid4().hex[:8]}"
        self._others_secrets = self.secrets()
        backend.sets.create(
            self.set,
            provider="platform-managed",
            key="default",
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
        )

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run a command inside the host, which must exit with *status*: its output and errors together."""
        done = self.popen(*command)
        said, _ = done.communicate(timeout=60)
        assert done.returncode == status, f"{command}: {said}"
        assert "Traceback" not in said
        return said

    def popen(self, *command: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.host.command(command),
            env=typing_environment(self.host),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def virt_sse(self, *arguments: str | Path, status: int = 0) -> str:
        """As :meth:`run`, of ``virt-sse`` with *arguments*."""
        environment = typing_environment(self.host)
        done = run_command(arguments, environment, together=True, inside=self.host.command([]))
        assert done.returncode == status, f"{arguments}: {done.stdout}"
        assert "Traceback" not in done.stdout
        return done.stdout

    def virsh(self, *arguments: str | Path, status: int = 0) -> str:
        return self.run("virsh", *arguments, status=status)

    def disk(
        self, image_format: str = "qcow2", *, size: int | None = None, encryption_set: str | None = None
    ) -> Disk:
        """A disk, double by default: empty and of *size* bytes, or with a boot-sector guest that stays."""
        name = f"d{uuid.uuid4().hex[:8]}"
        new = NewDisk(
            name=name,
            size=size,
            format=DiskFormat(image_format),
            encryption_set=encryption_set or self.set,
        )
        if size is not None:
            return self.backend.disks.create(new)
        source = boot_sector_image(stays=True)
        return self.backend.transfer.import_image(new, source, source_format="raw")

    def single_disk(self, image_format: str = "qcow2", *, size: int = 8 << 20) -> Disk:
        """An empty disk with one layer, outside of the site's set."""
        name = f"s{uuid.uuid4().hex[:8]}"
        return self.backend.disks.create(NewDisk(name=name, size=size, format=DiskFormat(image_format)))

    def dek(self, disk: Disk, slot: str) -> Dek:
        entry = disk.dek(slot)
        provider = self.backend.host.plugins.key_provider(entry.wrapped.key.provider)
        return provider.unwrap(entry.wrapped, context=disk.context(slot))

    def guest(self, *disks: Disk) -> Guest:
        """A defined guest with these disks; the name begins with the first disk's."""
        elements = [
            self.backend.domains.disk_element(disk.name, target=f"vd{letter}")
            for disk, letter in zip(disks, "abcdefgh", strict=False)
        ]
        name = f"{disks[0].name}-{uuid.uuid4().hex[:4]}"
        guest = Guest(self.host, name, acceleration=self.acceleration, disks=elements)
        guest.define()
        return guest

    def start_paused(self, guest: Guest) -> None:
        """Start *guest* paused."""
        self.virsh("start", guest.name, "--paused")

    def processes(self) -> list[Running]:
        """All processes of the host."""
        supervisor = self.host.command([])[1].removeprefix("--mount=").removesuffix("/mnt")
        namespace = os.stat(f"{supervisor}/pid_for_children").st_ino  # noqa: PTH116 -- a symbolic link
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and (folder / "ns/pid").stat().st_ino == namespace:
                    found.append(Running(int(folder.name)))
        return found

    def stage_processes(self) -> list[Running]:
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                if process.command and Path(process.command[0]).name in _STAGE_PROGRAMS:
                    found.append(process)
        return found

    def qemu(self, guest: Guest) -> Running:
        """The QEMU process of a running guest."""
        pattern = f"guest={guest.name},"
        (found,) = (
            process
            for process in self.processes()
            if any(argument.startswith(pattern) for argument in process.command)
        )
        return found

    def storage(self, disk: Disk) -> LockedProcess:
        return LockedProcess(self.backend.host.config.stage_directory / str(disk.id) / "storage")

    def secrets(self) -> list[str]:
        return secret_usages(self.host)

    def qemu_io(self, guest: Guest, command: str, *, disk: int = 0) -> str:
        """Run qemu-io within a guest's QEMU, through all layers below the guest: its output.

        :param disk: the number of the guest's disk.
        """
        log = self.host.root / f"var/log/libvirt/qemu/{guest.name}.log"
        before = len(log.read_bytes())
        device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
        end = f"end-{uuid.uuid4()}"
        with contextlib.closing(self.host.connect()) as connection:
            flag = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            domain = connection.lookupByName(guest.name)
            answers = [
                libvirt_qemu.qemuMonitorCommand(domain, f'qemu-io -d {device} "{each}"', flag)
                for each in (command, f"help {end}")
            ]

        def said() -> str:
            return log.read_bytes()[before:].decode(errors="replace")

        # QEMU's standard output comes to the log by way of virtlogd, in its own time, but in order.
        wait_until(lambda: f"command {end} not found" in said(), "QEMU has written its answer to the log")
        return said() + answers[0]

    def state(self, guest: Guest) -> tuple[int, int]:
        """libvirt's state and reason of a domain."""
        with contextlib.closing(self.host.connect()) as connection:
            state, reason = connection.lookupByName(guest.name).state()
            return state, reason

    def left(self) -> dict[str, Sequence[object]]:
        """Leftovers of guests and stages, by kind; empty if there are none."""
        config = self.backend.host.config
        found = {
            "processes": [process.command for process in self.stage_processes()],
            "records": self.backend.host.stages.records(),
            "sockets": list(config.socket_directory.glob("*")),
            "folders": list(config.stage_directory.glob("*")),
            "caches": list(config.cache_directory.glob("*")),
            "secrets": [each for each in self.secrets() if each not in self._others_secrets],
        }
        return {name: things for name, things in found.items() if things}

    def forget_domains(self) -> None:
        forget_domains(self.host)


@contextlib.contextmanager
def stage_site(host: LabHost, acceleration: Acceleration, config: str = CONFIG) -> Iterator[StageSite]:
    with prepared(host, config) as backend:
        yield StageSite(host, backend, acceleration)


def show(site: StageSite, disk: Disk) -> dict[str, object]:
    document: dict[str, object] = json.loads(site.virt_sse("disk", "show", disk.name, "-o", "json"))
    return document


def owner(disk: Disk) -> int:
    """The user ID of the owner of the disk's image."""
    return disk.path.stat().st_uid


def stage_site_fixtures() -> tuple[Any, Any]:
    """The fixtures ``running_site`` and ``site`` of a module whose tests share a site, and leave nothing."""

    @pytest.fixture(scope="module", name="running_site")
    def running_site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
        with stage_site(lab_host, acceleration("boot-sector")) as site:
            yield site

    @pytest.fixture(name="site")
    def site(running_site: StageSite) -> Iterator[StageSite]:
        yield running_site
        running_site.forget_domains()
        assert running_site.left() == {}

    return running_site, site
