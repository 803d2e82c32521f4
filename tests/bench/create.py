"""Making an encrypted disk: ``Disks.create`` against ``qemu-img create`` with LUKS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hosts import private_backend
from measurement import Measurement, Row, Run, Target, seconds
from virt_sse.errors import ToolError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.model.keys import Dek
from virt_sse.system.tools import passphrase_descriptor, run

_SIZE = 10 << 30
_TARGET = Target(seconds=0.15, ratio=10)
_SPURIOUS = "Unable to get accurate CPU usage"
_MOST_TRIES = 50


def measure(bench: Run) -> Iterator[Row]:
    """Measure both formats, in process.

    PBKDF2 dominates the time of qemu-img, so a detail gives the time with minimal PBKDF2. Spurious failures
    of qemu-img are counted, but do not add to its time.
    """
    with private_backend(bench.scratch / "create") as backend:
        for image_format in DiskFormat:
            name = image_format.value
            first, *ours = [
                seconds(
                    partial(
                        backend.disks.create, NewDisk(name=f"{name}-{index}", size=_SIZE, format=image_format)
                    )
                )
                for index in range(1 + bench.amount(15, quick=5))
            ]
            peer = _QemuImg(bench.scratch / f"peer.{name}", image_format)
            usual = [
                peer.create(iter_time=10 if bench.quick else None) for _ in range(bench.amount(5, quick=1))
            ]
            yield Row(
                f"create/{name}",
                f"create a disk, 10 GiB {name}",
                Measurement.median(ours),
                Measurement.median(usual),
                "qemu-img create with LUKS",
                _TARGET,
                {
                    "first_ms": first * 1000,
                    "peer_least_pbkdf_s": peer.create(iter_time=10),
                    "peer_spurious_failures": peer.spurious_failures,
                },
            )


class _QemuImg:
    """``qemu-img create`` as a process, repeated until success."""

    def __init__(self, path: Path, image_format: DiskFormat) -> None:
        self.spurious_failures = 0
        self._path = path
        self._format = image_format

    def create(self, *, iter_time: int | None = None) -> float:
        """Duration of the successful call, in seconds.

        :param iter_time: milliseconds of PBKDF2 for opening the image; QEMU's default if ``None``.
        :raise ToolError: When qemu-img fails for a genuine reason, or spuriously too often.
        """
        for _ in range(_MOST_TRIES):
            try:
                return self._create(iter_time)
            except ToolError as exc:
                if _SPURIOUS not in str(exc):
                    raise
                self.spurious_failures += 1
            finally:
                self._path.unlink(missing_ok=True)
        raise ToolError(f"qemu-img failed {_MOST_TRIES} times to measure this machine's speed")

    def _create(self, iter_time: int | None) -> float:
        prefix = self._format.luks_option_prefix
        options = [f"{self._format.qemu_key_secret}=dek"]
        if prefix:
            options.append("encrypt.format=luks")
        if iter_time is not None:
            options.append(f"{prefix}iter-time={iter_time}")
        with passphrase_descriptor(Dek.generate().passphrase) as descriptor:
            command = ["qemu-img", "create", "-q", "-f", self._format.qemu_driver, "-o", ",".join(options)]
            command += ["--object", f"secret,id=dek,file=/proc/self/fd/{descriptor}"]
            began = time.perf_counter()
            run([*command, str(self._path), str(_SIZE)], confinement=None, pass_fds=[descriptor])
            return time.perf_counter() - began
