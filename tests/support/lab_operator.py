"""An operator at a lab host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.agent_site import forget_domains
from support.loaded_commands import run_command
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image


def typing_environment(host: LabHost) -> dict[str, str]:
    """The environment of *host* for commands with virt-sse's own in ``PATH``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return host.environment | {"PATH": path}


class Operator:
    """Types commands on a lab host."""

    def __init__(self, host: LabHost) -> None:
        self.host = host

    def run(self, *command: str | Path, status: int = 0) -> str:
        """A command's standard output and error together; its exit status must be *status*."""
        done = subprocess.run(
            list(map(str, command)),
            env=typing_environment(self.host),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{command}: {done.stdout}"
        assert "Traceback" not in done.stdout
        return done.stdout

    def virt_sse(self, *arguments: str | Path, status: int = 0) -> str:
        """The output and errors together of ``virt-sse`` with *arguments*."""
        done = run_command(arguments, self.host.environment, together=True)
        assert done.returncode == status, f"{arguments}: {done.stdout}"
        assert "Traceback" not in done.stdout
        return done.stdout

    def virsh(self, *arguments: str | Path, status: int = 0) -> str:
        return self.run("virsh", *arguments, status=status)

    def create(self, name: str, *arguments: str, image_format: str = "qcow2") -> str:
        """Make a disk; its ``<disk>`` element."""
        path = self.host.images / f"{name}.{image_format}"
        self.virt_sse("disk", "create", name, "--format", image_format, "--path", path, *arguments)
        return self.virt_sse("disk", "xml", name)

    def import_boot_sector(self, name: str, *, stays: bool = False, image_format: str = "qcow2") -> str:
        path = self.host.images / f"{name}.{image_format}"
        source = boot_sector_image(stays=stays)
        self.virt_sse("disk", "import", name, source, "--path", path, "--format", image_format)
        return self.virt_sse("disk", "xml", name)

    def secrets(self) -> list[str]:
        """The usage IDs of our secrets in libvirt, sorted: libvirt lists them in any order."""
        return sorted(word for word in self.virsh("secret-list").split() if word.startswith("virt-sse:"))

    def forget_domains(self) -> None:
        forget_domains(self.host)
