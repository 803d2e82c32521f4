"""The stage of the demo's acts: a lab host, and a terminal showing commands and their output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from virt_sse.errors import LabError
from virt_sse.lab.host import LabHost
from virt_sse.lab.requirements import SYSTEM_PATH


class Stage:
    """Runs commands on *host* like a user, and shows the commands and their output."""

    def __init__(self, host: LabHost) -> None:
        self.host = host

    def at(self, disk: str) -> tuple[str, Path]:
        """The options to place the image of *disk* in a folder accessible to the host's guests."""
        return "--path", self.host.images / f"{disk}.qcow2"

    def virt_sse(self, *arguments: str | Path, succeeds: bool = True) -> str:
        """Show and run ``virt-sse``; returns its output.

        :raise LabError: When success or failure does not match *succeeds*.
        """
        return self.type("virt-sse", *arguments, succeeds=succeeds)

    def virsh(self, *arguments: str | Path, succeeds: bool = True) -> str:
        """Show and run ``virsh``, as :meth:`virt_sse` does."""
        return self.type("virsh", *arguments, succeeds=succeeds)

    def type(self, *command: str | Path, succeeds: bool = True) -> str:
        """Show and run a command, as :meth:`virt_sse` does."""
        quote(f"$ {' '.join(map(str, command))}")
        said = self.run(*command, succeeds=succeeds)
        quote(said)
        return said

    def run(self, *command: str | Path, succeeds: bool = True) -> str:
        """Run a command without showing, otherwise as :meth:`virt_sse` does."""
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), SYSTEM_PATH]
        )
        result = self.host.run(command, env={"PATH": path})
        if (result.returncode == 0) != succeeds:
            line = " ".join(map(str, command))
            raise LabError(f"{line} exited {result.returncode}: {result.stdout}{result.stderr}".strip())
        return result.stdout + result.stderr

    def see_no_secret(self) -> None:
        """Check that libvirt has no secret of virt-sse; to be called when no domain is running.

        :raise LabError: When libvirt has such a secret.
        """
        if "virt-sse" in self.virsh("secret-list"):
            raise LabError("a libvirt secret outlived its domain")


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def quote(text: str) -> None:
    """Print the output of a command or a guest, indented."""
    for line in text.strip().splitlines():
        print(f"   {line}", flush=True)
