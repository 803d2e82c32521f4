"""A volume of GlusterFS, a distributed file system, for tests: servers in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import wait_until
from virt_sse.system.leash import leashed

_PORT = 24007
"""Clients ask at this port for a volume, whatever it is."""
_OTHERS = ("/var/lib/glusterd", "/var/run/gluster", "/var/log/glusterfs")
"""Folders of the machine's own servers, which those of the tests do not see."""
_OPTIONS = {
    "performance.quick-read": "off",
    "performance.read-ahead": "off",
    "performance.io-cache": "off",
    "performance.stat-prefetch": "off",
    "performance.open-behind": "off",
}
"""As in GlusterFS's own group of options for images."""


class GlusterVolume:
    """A volume with one brick.

    :ivar address: of the servers, as for clients; GlusterFS takes no loopback address.
    :ivar name: of the volume.
    """

    name = "images"

    def __init__(self, folder: Path, address: str) -> None:
        self.address = address
        self._folder = folder
        self._socket = folder / "socket"

    @contextlib.contextmanager
    def mounted(self, place: Path) -> Iterator[None]:
        """Mount the volume in this process's mount namespace for the time of the block."""
        options = f"log-file={self._folder}/client.log"
        volume = f"{self.address}:/{self.name}"
        subprocess.run(["mount", "-t", "glusterfs", "-o", options, volume, place], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", place], check=True)

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Make the volume, and serve it for the time of the block."""
        options = {
            "type": "mgmt/glusterd",
            "option working-directory": self._folder / "state",
            "option glusterd-sockfile": self._socket,
            "option transport-type": "socket",
            "option transport.socket.listen-port": _PORT,
            "option transport.socket.bind-address": self.address,
        }
        for name in ("state", "brick"):
            (self._folder / name).mkdir()
        described = "\n".join(f"  {name} {value}" for name, value in options.items())
        (self._folder / "glusterd.vol").write_text(f"volume management\n{described}\nend-volume\n")
        hidden = [f"mount -t tmpfs none {place}" for place in _OTHERS if Path(place).is_dir()]
        files = f"-f {self._folder}/glusterd.vol -p {self._folder}/pid -l {self._folder}/log"
        with (
            (self._folder / "output").open("wb") as output,
            leashed(
                ["sh", "-c", " && ".join([*hidden, f"exec glusterd -N {files}"])],
                in_namespace=True,
                stdin=subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=output,
                pass_fds=(),
                environment={"PATH": os.environ["PATH"]},
            ),
        ):
            wait_until(self._socket.exists, "glusterd answers")
            self._gluster("create", f"{self.address}:{self._folder}/brick", "force")
            for option, value in {**_OPTIONS, "auth.allow": self.address}.items():
                self._gluster("set", option, value)
            self._gluster("start")
            yield

    def _gluster(self, verb: str, *arguments: str) -> None:
        options = [f"--glusterd-sock={self._socket}", f"--log-file={self._folder}/cli.log", "--mode=script"]
        done = subprocess.run(
            ["gluster", *options, "volume", verb, self.name, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def gluster_volume(folder: Path) -> Iterator[GlusterVolume]:
    """A volume in *folder*, served for the time of the block; skips, naming what is missing."""
    for program in ("glusterd", "gluster", "mount.glusterfs"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (Debian's package 'glusterfs-server')")
    if not Path("/dev/fuse").exists():
        pytest.skip("the kernel has no FUSE")
    volume = GlusterVolume(folder, _address())
    with volume.served():
        yield volume


def _address() -> str:
    """An address of this machine other than a loopback address, at which nobody serves volumes."""
    found = subprocess.run(["hostname", "--all-ip-addresses"], capture_output=True, text=True, check=True)
    addresses = [address for address in found.stdout.split() if ":" not in address]
    if not addresses:
        pytest.skip("the machine has no IPv4 address but the loopback address")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((addresses[0], _PORT))
        except OSError as exc:
            pytest.skip(f"port {_PORT} of {addresses[0]}: {exc}")
    return addresses[0]
