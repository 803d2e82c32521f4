"""Throw-away Ceph clusters of a monitor and an OSD, on loopback, with a pool for RBD images."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Self
from uuid import uuid4

from virt_sse.errors import LabError
from virt_sse.lab.directories import OwnedDirectory
from virt_sse.lab.requirements import require
from virt_sse.lab.vaults import free_port
from virt_sse.model.ceph import CephCluster
from virt_sse.system.files import private_folder, write_private
from virt_sse.system.leash import leashed

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_COMMAND_SECONDS = 60
_CONFIG = """\
[global]
fsid = {fsid}
mon host = {monitors}
public addr = {host}
cluster addr = {host}
keyring = {folder}/admin.keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
crash dir = {folder}
mon data = {folder}/mon
mon data avail crit = 0
mon data avail warn = 1
mon allow pool size one = true
mon osd down out interval = 0
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd data = {folder}/osd
osd class load list = *
osd class default list = *
osd memory target = 939524096
bluestore block size = {osd_bytes}
bluestore cache autotune = false
bluestore cache size = 33554432
[mon]
keyring = {folder}/mon/keyring
[osd]
keyring = {folder}/osd/keyring
"""
_OSD_BYTES = 1 << 30


class LabCeph:
    """A cluster; a context manager that makes, starts and later removes it.

    The pool :attr:`pool` is for RBD images. There is no manager daemon, which only reports.

    :param base: directory for the folder of the cluster.
    :ivar pool: name of the pool.
    """

    pool = "lab"

    def __init__(self, *, base: Path = Path("/tmp")) -> None:  # noqa: S108 -- uses a private folder below
        self._folder = OwnedDirectory(base, "the lab's Ceph cluster")
        self._running = contextlib.ExitStack()
        self._osd_running = contextlib.ExitStack()
        self._osd: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __repr__(self) -> str:
        return f"LabCeph({self.monitor})"

    def __enter__(self) -> Self:
        require("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "ceph", "rbd", "setpriv")
        self._folder.make()
        try:
            self._prepare()
            self._start("ceph-mon", "a", self._running)
            self._make_osd()
            self.start_osd()
            self.ceph("osd", "pool", "create", self.pool, "8")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._osd_running.close()
        self._running.close()
        self._folder.remove()

    @property
    def directory(self) -> Path:
        """The cluster's folder, with its configuration and its data.

        :raise LabError: When the cluster has not been made, or was removed.
        """
        return self._folder.path / "ceph"

    @property
    def monitor(self) -> str:
        """Address of the monitor, host and port."""
        return f"{_HOST}:{self._port}"

    def ceph(self, *arguments: str) -> str:
        """Run ceph(8) as the administrator: its output.

        :raise LabError: When the command fails.
        """
        return self._run("ceph", *arguments)

    def rbd(self, *arguments: str) -> str:
        """Run rbd(8) as the administrator: its output.

        :raise LabError: When the command fails.
        """
        return self._run("rbd", *arguments)

    def keyring(self, user: str) -> Path:
        """The keyring of a user for RBD images in the pool; the user is made at the first call."""
        path = self.directory / f"{user}.keyring"
        if not path.exists():
            caps = ["mon", "profile rbd", "osd", f"profile rbd pool={self.pool}"]
            write_private(path, self.ceph("auth", "get-or-create", f"client.{user}", *caps).encode())
        return path

    def cluster(self, user: str) -> CephCluster:
        """The cluster as a host's configuration describes it, for a user of :meth:`keyring`."""
        return CephCluster(((_HOST, self._port),), user, self.keyring(user))

    def start_osd(self) -> None:
        """Start the OSD; return once the monitor knows.

        :raise LabError: When the OSD does not start.
        """
        self._osd = self._start("ceph-osd", "0", self._osd_running)
        end = time.monotonic() + _START_SECONDS
        while not json.loads(self.ceph("osd", "stat", "--format", "json"))["num_up_osds"]:
            if self._osd.poll() is not None or time.monotonic() > end:
                raise self._failure("ceph-osd")
            time.sleep(0.1)

    def kill_osd(self) -> None:
        """Kill the OSD, with the effect of a power failure: no client can read or write."""
        assert self._osd is not None  # noqa: S101 -- made by __enter__
        self._osd_running.close()

    def _prepare(self) -> None:
        folder = private_folder(self.directory)
        self._port, fsid = free_port(), str(uuid4())
        monitors = f"[v2:{_HOST}:{self._port},v1:{_HOST}:{free_port()}]"
        config = _CONFIG.format(fsid=fsid, monitors=monitors, host=_HOST, folder=folder, osd_bytes=_OSD_BYTES)
        write_private(folder / "ceph.conf", config.encode())
        for name in ("mon", "osd"):
            private_folder(folder / name)
        mon, admin = str(folder / "mon.keyring"), str(folder / "admin.keyring")
        all_of = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
        self._run("ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin", *all_of)
        self._run("ceph-authtool", "--create-keyring", mon, "--gen-key", "-n", "mon.", *all_of[:3])
        osd, profile = str(folder / "osd/keyring"), ["--cap", "mon", "allow profile osd", *all_of[3:]]
        self._run("ceph-authtool", "--create-keyring", osd, "--gen-key", "-n", "osd.0", *profile)
        for other in (admin, osd):
            self._run("ceph-authtool", mon, "--import-keyring", other)
        self._run("monmaptool", "--create", "--addv", "a", monitors, "--fsid", fsid, str(folder / "monmap"))
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), "--keyring", mon)

    def _make_osd(self) -> None:
        made = str(uuid4())
        self.ceph("osd", "new", made)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", made)

    def _start(self, program: str, name: str, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        with (self.directory / f"{program}.out").open("ab") as output:
            return stack.enter_context(
                leashed(
                    [program, "-f", "-i", name, *self._config],
                    in_namespace=False,
                    stdin=subprocess.DEVNULL,
                    stdout=output.fileno(),
                    stderr=output,
                    pass_fds=(),
                    environment={"HOME": str(self.directory), "PATH": os.environ["PATH"]},
                )
            )

    @property
    def _config(self) -> list[str]:
        return ["--conf", str(self.directory / "ceph.conf")]

    def _run(self, program: str, *arguments: str) -> str:
        config = [] if program in ("ceph-authtool", "monmaptool") else self._config
        try:
            done = subprocess.run(
                [program, *config, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"{program} {arguments[0]} did not finish within {_COMMAND_SECONDS} s") from exc
        if done.returncode:
            raise LabError(f"{program} {' '.join(arguments[:3])} failed: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def _failure(self, program: str) -> LabError:
        error = LabError(f"the lab's {program} does not start")
        error.add_note((self.directory / f"{program}.out").read_text()[-2000:])
        return error
