"""CPU time that encryption adds to a sequential write: virt-sse's XTS library against QEMU's own XTS."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from measurement import Measurement, Row, Run, Target
from virt_sse.errors import LabUnavailableError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, img
from virt_sse.qemu.formatting import Volume
from virt_sse.system import acceleration
from virt_sse.system.tools import run

_MIB, _GIB = 1 << 20, 1 << 30
_ROUNDS = 5
_TARGETS = {DiskFormat.RAW: Target(seconds=0.4, ratio=3), DiskFormat.QCOW2: Target(seconds=0.5, ratio=3)}


def measure(bench: Run) -> Iterator[Row]:
    """Measure both formats in interleaved rounds: a plain image, QEMU's own XTS, the library.

    :raise LabUnavailableError: When the library cannot be used.
    """
    if reason := acceleration.obstacle():
        raise LabUnavailableError(f"the XTS library: {reason}")
    size = bench.amount(512, quick=64) * _MIB
    folder = bench.scratch / "xts"
    folder.mkdir()
    for image_format, target in _TARGETS.items():
        dek = Dek.generate()
        plain, encrypted = folder / f"plain.{image_format.value}", folder / f"luks.{image_format.value}"
        run(["qemu-img", "create", "-q", "-f", image_format.value, str(plain), str(size)])
        formatting.make(encrypted, image_format, size, [Volume(AES_256_XTS, dek)])
        own = {**os.environ, **acceleration.ALLOCATOR}
        samples: dict[str, list[float]] = {"plain": [], "own": [], "ours": []}
        _write(encrypted, image_format, size, own, dek)  # allocates the clusters
        _write(plain, image_format, size, own)
        for _ in range(bench.amount(_ROUNDS, quick=1)):
            samples["plain"].append(_write(plain, image_format, size, own))
            samples["own"].append(_write(encrypted, image_format, size, own, dek))
            ours = {**os.environ, **acceleration.environment(os.environ)}
            samples["ours"].append(_write(encrypted, image_format, size, ours, dek))
        plain.unlink()
        encrypted.unlink()
        base = Measurement.median(samples["plain"])
        yield Row(
            f"xts/{image_format.value}",
            f"{image_format.value}, CPU time added per GiB by encryption",
            _added(samples["ours"], base),
            _added(samples["own"], base),
            "QEMU's own XTS, same allocator settings",
            target,
            {"plain_cpu_s_per_gib": base.value},
        )


def _added(samples: list[float], plain: Measurement) -> Measurement:
    return Measurement.median([sample - plain.value for sample in samples])


def _write(
    path: Path, image_format: DiskFormat, size: int, environment: Mapping[str, str], dek: Dek | None = None
) -> float:
    """CPU seconds per GiB, user and system, of qemu-img that writes *size* bytes in process."""
    deks = [dek] if dek else []
    target = (
        img.image_options(path, image_format, 1)
        if dek
        else f"driver={image_format.value},file.driver=file,file.filename={path}"
    )
    source = f"driver=null-co,size={size},read-zeroes=off"
    with img.secrets_for(deks) as (secrets, descriptors):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            ["qemu-img", "convert", "-n", "-S", "0", *secrets, "--image-opts", "--target-image-opts"]
            + [source, target],
            pass_fds=descriptors,
            env=environment,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent * _GIB / size
