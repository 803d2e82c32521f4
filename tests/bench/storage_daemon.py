"""An image behind a ``qemu-storage-daemon``, exported over NBD, and fio to generate load."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import LabUnavailableError, ToolError
from virt_sse.model.keys import Dek
from virt_sse.system import acceleration
from virt_sse.system.tools import passphrase_descriptor, run

_START_SECONDS = 10.0
_EXPORT = "disk"


def require_tools() -> None:
    """Check for QEMU's storage daemon and fio.

    :raise LabUnavailableError: When one of the tools is missing.
    """
    for tool, package in (("qemu-storage-daemon", "qemu-system-common"), ("fio", "fio")):
        if shutil.which(tool) is None:
            raise LabUnavailableError(f"{tool} is not installed", hint=f"apt-get install {package}")


@dataclass(frozen=True, slots=True)
class Export:
    """A running daemon's export.

    :ivar pids: process IDs of the daemon and of the stages between daemon and storage.
    """

    socket: Path
    pids: tuple[int, ...]

    def cpu_seconds(self) -> float:
        """CPU time of all processes so far, user and system (proc(5), ``/proc/PID/stat``)."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def exported(
    node: str,
    folder: Path,
    *,
    dek: Dek | None = None,
    below: Sequence[int] = (),
    environment: Mapping[str, str] = acceleration.ALLOCATOR,
) -> Iterator[Export]:
    """Export a block node of a storage daemon over NBD.

    :param node: the daemon's ``--blockdev`` argument without its ``node-name``.
    :param folder: parent of a private folder for the socket.
    :param dek: content of the secret object ``dek``, if named in *node*; passed through a pipe.
    :param below: IDs of the processes between the daemon and the storage.
    :param environment: environment variables of the daemon, beside the caller's.
    :raise ToolError: When the daemon does not start.
    """
    with contextlib.ExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        secret, passed = [], []
        if dek is not None:
            passed = [stack.enter_context(passphrase_descriptor(dek.passphrase))]
            secret = ["--object", f"secret,id=dek,file=/proc/self/fd/{passed[0]}"]
        path = private / "nbd"
        with (private / "stderr").open("w+") as said:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon", *secret]
                + ["--blockdev", f"node-name=disk,{node}", "--nbd-server", f"addr.type=unix,addr.path={path}"]
                + ["--export", f"type=nbd,id=export,node-name=disk,name={_EXPORT},writable=on"],
                stdin=subprocess.DEVNULL,
                stderr=said,
                pass_fds=passed,
                env={**os.environ, **environment},
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            _await(process, path, private / "stderr")
        yield Export(path, (process.pid, *below))


def _await(process: subprocess.Popen[bytes], path: Path, said: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return
        time.sleep(0.01)
    raise ToolError(f"qemu-storage-daemon does not start: {said.read_text().strip() or 'nothing said'}")


@dataclass(frozen=True, slots=True)
class Load:
    """A load for fio.

    :ivar what: description.
    :ivar pattern: fio's ``rw``.
    :ivar block: bytes per request.
    :ivar depth: number of requests at a time.
    """

    what: str
    pattern: str
    block: int
    depth: int = 16


@dataclass(frozen=True, slots=True)
class Throughput:
    """Result of fio.

    :ivar cpu_seconds_per_gib: CPU time of the daemon and of the stages below the daemon.
    :ivar p50, p99: percentiles of the latency of requests, in seconds.
    """

    bytes_per_second: float
    cpu_seconds_per_gib: float
    p50: float
    p99: float


def drive(export: Export, load: Load, size: int, *, runtime: float | None) -> Throughput:
    """Run *load* on the first *size* bytes of the export.

    :param runtime: duration in seconds; if ``None``, until each byte was written or read once.
    :raise ToolError: When fio fails.
    """
    limit = ["--time_based", f"--runtime={int(runtime * 1000)}ms"] if runtime else []
    before = export.cpu_seconds()
    report = run(
        ["fio", "--name=bench", "--thread", "--output-format=json", "--ioengine=nbd"]
        + [f"--uri=nbd+unix:///{_EXPORT}?socket={export.socket}", f"--rw={load.pattern}"]
        + [f"--bs={load.block}", f"--iodepth={load.depth}", f"--size={size}"]
        + ["--refill_buffers", "--norandommap", *limit],
        confinement=None,
    )
    used = export.cpu_seconds() - before
    (job,) = json.loads(report[report.index("{") :])["jobs"]  # the nbd engine prints a line before the JSON
    side = job[next(kind for kind in ("write", "trim", "read") if kind in load.pattern)]
    percentiles = side["clat_ns"].get("percentile", {})
    return Throughput(
        side["bw_bytes"],
        used / (side["io_bytes"] / (1 << 30)),
        *(percentiles.get(f"{percent}.000000", 0) / 1e9 for percent in (50, 99)),
    )
