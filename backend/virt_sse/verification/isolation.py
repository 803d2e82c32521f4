"""Verifies the isolation of a stage process: user, network, seccomp filter, no new privileges (proc(5))."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from virt_sse.stages import seccomp
from virt_sse.stages.stage_process import StageProcess
from virt_sse.verification.verdict import DiskVerdict

_FILTERED = "2"
"""``SECCOMP_MODE_FILTER``."""


def check_isolation(verdict: DiskVerdict, process: StageProcess[Any], pid: int) -> None:
    """Check that a running process has the recorded user, and no right that its start takes away."""
    folder, title = Path("/proc") / str(pid), process.title
    with contextlib.suppress(OSError):  # the process has ended; its other checks say so
        lines = (folder / "status").read_text().splitlines()
        status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        user = process.place.user
        for field, wanted in (("Uid", user.uid), ("Gid", user.gid)):
            found = sorted(set(map(int, status[field].split())))
            verdict.expect(found == [wanted], f"the {title} has {field.lower()} {found}, not {wanted}")
        verdict.expect(status["NoNewPrivs"] == "1", f"the {title} may gain new privileges")
        if seccomp.is_available():
            verdict.expect(status["Seccomp"] == _FILTERED, f"the {title} runs without a seccomp filter")
        shares = (folder / "ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino
        verdict.expect(process.has_network or not shares, f"the {title} shares the host's network")
