"""The sandbox of the agent's systemd unit."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import unit_sandbox
from support.images import require
from virt_sse import agent
from virt_sse.agent.systemd import write_units
from virt_sse.config import Config

UNIT = (Path(agent.__file__).parent / "units/virt-sse-agent.service").read_text()
MOST_EXPOSURE = 52
"""Ten times systemd-analyze's exposure level: the agent's is 5.0."""
CONFINED = """
from virt_sse.system.confinement import Confinement
from virt_sse.system.tools import run
print(run(["echo", "confined"], confinement=Confinement()))
"""


def _values(setting: str) -> list[str]:
    lines = [line for line in UNIT.splitlines() if line.startswith(f"{setting}=")]
    return [value for line in lines for value in line.partition("=")[2].split()]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_agents_sandbox_lets_the_agent_confine_tools() -> None:
    """Only the capabilities are applied here; test_agent_sandbox.py applies the rest."""
    require("bwrap", "setpriv", "prlimit")
    kept = [name.removeprefix("CAP_").lower() for name in _values("CapabilityBoundingSet")]
    bounded = ["setpriv", f"--bounding-set=-all,{','.join(f'+{name}' for name in kept)}", "--no-new-privs"]
    done = subprocess.run(
        [*bounded, sys.executable, "-c", CONFINED], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "confined"
    assert set(_values("RestrictNamespaces")) == {"ipc", "mnt", "net", "pid"}
    assert "AF_NETLINK" in _values("RestrictAddressFamilies"), "bwrap brings the loopback interface up"
    assert "@mount" in _values("SystemCallFilter")


def test_systemd_accepts_the_units_and_their_exposure(root: Path) -> None:
    require("systemd-analyze")
    config = Config.load(root)
    units = write_units(root / "units", config)
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    for unit in units:
        if unit.suffix == ".service":
            command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", unit]
            assert subprocess.run(command, capture_output=True).returncode == 0, unit.name


TRIED = """
import os, socket
tried = {
    "packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "clock": lambda: __import__("time").clock_settime(0, 0),
    "device": lambda: os.mknod("/tmp/virt-sse-device", 0o20600, os.makedev(1, 3)),
    "system file": lambda: open("/usr/virt-sse", "w"),
    "unix socket": lambda: socket.socket(socket.AF_UNIX),
}
for name, call in tried.items():
    try: call()
    except OSError as error: print(name, error.errno)
    else: print(name, 0)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_sandbox_of_the_tests_refuses_what_the_unit_refuses(tmp_path: Path) -> None:
    require("systemd-analyze", "mount")
    unit = tmp_path / "unit"
    unit.write_text(UNIT)
    command = [sys.executable, unit_sandbox.__file__, unit, sys.executable, "-c", TRIED]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    refused = [f"{name} {errno.EPERM}" for name in ("packets", "clock", "device")]
    assert said == [*refused, f"system file {errno.EROFS}", "unix socket 0"]
