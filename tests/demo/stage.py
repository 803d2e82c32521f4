"""What the demo's acts are played on: a lab host, and a terminal that shows what is typed and said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from virt_sse.errors import LabError
from virt_sse.lab.host import LabHost
from virt_sse.lab.requirements import SYSTEM_PATH


class Stage:
    """Types commands on *host*, as a user would, and shows them."""

    def __init__(self, host: LabHost) -> None:
        self.host = host

    def at(self, disk: str) -> tuple[str, Path]:
        """The options that put the image of *disk* where the host's guests may reach it."""
        return "--path", self.host.images / f"{disk}.qcow2"

    def virt_sse(self, *arguments: str | Path, succeeds: bool = True) -> str:
        """Show and run ``virt-sse``; what it says.

        :raise LabError: When it succeeds and should not, or the other way round.
        """
        return self.type("virt-sse", *arguments, succeeds=succeeds)

    def virsh(self, *arguments: str | Path, succeeds: bool = True) -> str:
        """Show and run ``virsh``, likewise."""
        return self.type("virsh", *arguments, succeeds=succeeds)

    def type(self, *command: str | Path, succeeds: bool = True) -> str:
        """Show and run a command, likewise."""
        quote(f"$ {' '.join(map(str, command))}")
        said = self.run(*command, succeeds=succeeds)
        quote(said)
        return said

    def run(self, *command: str | Path, succeeds: bool = True) -> str:
        """Run a command behind the scenes, likewise."""
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), SYSTEM_PATH]
        )
        result = self.host.run(command, env={"PATH": path})
        if (result.returncode == 0) != succeeds:
            line = " ".join(map(str, command))
            raise LabError(f"{line} exited {result.returncode}: {result.stdout}{result.stderr}".strip())
        return result.stdout + result.stderr

    def see_no_secret(self) -> None:
        """libvirt must have no secret of ours once no domain runs.

        :raise LabError: When it has.
        """
        if "virt-sse" in self.virsh("secret-list"):
            raise LabError("a secret outlived its domain")


def heading(text: str) -> None:
    """Say what comes."""
    print(f"\n== {text}", flush=True)


def quote(text: str) -> None:
    """Show what a command or a guest said."""
    for line in text.strip().splitlines():
        print(f"   {line}", flush=True)
