"""The sandbox of the agent's systemd unit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.images import require
from virt_sse import agent

UNIT = (Path(agent.__file__).parent / "units/virt-sse-agent.service").read_text()
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
    """Only the capabilities are applied here; seccomp filters need systemd."""
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
