"""The command line as a process: ``virt-sse --help`` against an idle Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from measurement import Row, Run, Target, alternate


def measure(bench: Run) -> Iterator[Row]:
    ours, peer = alternate(
        bench.amount(15, quick=5),
        _process(bench, Path(sys.executable).parent / "virt-sse", "--help"),
        _process(bench, sys.executable, "-c", "pass"),
    )
    yield Row("command/help", "virt-sse --help", ours, peer, "python -c pass", Target(seconds=0.25))


def _process(bench: Run, *command: str | Path) -> Callable[[], object]:
    environment = os.environ | {"VIRT_SSE_ROOT": str(bench.scratch)}
    return lambda: subprocess.run(command, env=environment, capture_output=True, check=True)
