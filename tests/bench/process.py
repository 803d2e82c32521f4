"""The data path in process: qemu-img writes and reads an image, without a socket.

The figure that noise of other processes spares is the CPU time, user and system, per GiB.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configurations import PLAIN, QCOW2, RAW, Configuration, DiskMaker, supports_direct
from hosts import dek_of, private_backend
from measurement import Measurement, Row, Run, Target, Unit
from virt_sse.backend import Backend
from virt_sse.errors import LabUnavailableError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import unlocking
from virt_sse.system import acceleration

_MIB, _GIB = 1 << 20, 1 << 30
_AIMS = {
    ("single", RAW): 0.4,
    ("single", QCOW2): 0.5,
    ("double", RAW): 1.0,
    ("double", QCOW2): 1.0,
}
"""The CPU time, in seconds per GiB, that encryption may add to a sequential write or read."""
_NEAR = 0.8
"""Part of the rate of a plain image from which on the storage counts as the limit."""
_SEQUENTIAL_RATIO = 3
_DIRECTIONS = ("write", "read")
_NOTE = "the outer layer is aes-256-cbc, which encrypts serially: 1.3 s per GiB"


@dataclass(frozen=True, slots=True)
class _Sample:
    """:ivar cpu: seconds per GiB. :ivar rate: bytes per second."""

    cpu: float
    rate: float


@dataclass(frozen=True, slots=True)
class _Image:
    """An image, as qemu-img opens it.

    :ivar deks: the guest's first.
    """

    path: Path
    format: DiskFormat
    deks: Sequence[Dek]
    environment: Mapping[str, str]


def measure(bench: Run) -> Iterator[Row]:
    """Measure all formats in interleaved rounds: a plain image, QEMU's own LUKS, with the XTS library.

    :raise LabUnavailableError: When the library cannot be used.
    """
    if reason := acceleration.obstacle():
        raise LabUnavailableError(f"the XTS library: {reason}")
    size = bench.amount(256, quick=64) * _MIB
    folder = bench.scratch / "process"
    folder.mkdir()
    caches = [("page cache", "writeback")]
    if supports_direct(folder) and not bench.quick:
        caches.append(("O_DIRECT", "none"))
    with private_backend(bench.scratch / "p") as backend:
        maker = DiskMaker(backend, folder, size)
        for (layers, image_format), aim in _AIMS.items():
            images = _images(backend, maker, layers, image_format)
            for what, cache in caches:
                samples: dict[tuple[str, str], list[_Sample]] = {
                    (name, direction): [] for name in images for direction in _DIRECTIONS
                }
                for image in images.values():
                    _run(image, "write", size, cache)  # allocates
                for _ in range(bench.amount(5, quick=1)):
                    for direction in _DIRECTIONS:
                        for name, image in images.items():
                            samples[name, direction].append(_run(image, direction, size, cache))
                for direction in _DIRECTIONS:
                    yield from _rows(samples, f"{layers}-{image_format.value}", what, direction, aim)
            for image in {image.path for image in images.values()}:
                image.unlink()


def _images(backend: Backend, maker: DiskMaker, layers: str, image_format: DiskFormat) -> dict[str, _Image]:
    configuration = Configuration(f"process-{layers}", "", image_format, layers=1 + (layers == "double"))
    disk = maker.disk(configuration)
    deks = [dek_of(backend, disk, entry.slot) for entry in disk.deks]
    plain = maker.plain(image_format)
    return {
        "plain": _Image(plain, image_format, [], PLAIN[image_format].environment),
        "own": _Image(disk.path, image_format, deks, acceleration.ALLOCATOR),
        "ours": _Image(disk.path, image_format, deks, configuration.environment),
    }


def _rows(
    samples: Mapping[tuple[str, str], Sequence[_Sample]], name: str, cache: str, direction: str, aim: float
) -> Iterator[Row]:
    plain, own, ours = (samples[each, direction] for each in ("plain", "own", "ours"))
    base = Measurement.median([each.cpu for each in plain])
    key = f"{name}/seq-{direction}{'-direct' if cache == 'O_DIRECT' else ''}"
    what = f"in process, {name.replace('-', ' layer ', 1)}, sequential {direction}, {cache}"
    note = _NOTE if name.startswith("double") and direction == "write" else ""
    yield Row(
        f"process/cpu/{key}",
        f"{what}: CPU time added per GiB",
        Measurement.median([each.cpu - base.value for each in ours]),
        Measurement.median([each.cpu - base.value for each in own]),
        "QEMU's own LUKS",
        Target(seconds=aim),
        {"plain_cpu_s_per_gib": base.value},
        note,
    )
    yield Row(
        f"process/rate/{key}",
        what,
        _rate(ours),
        _rate(own),
        "QEMU's own LUKS",
        Target(ratio=_SEQUENTIAL_RATIO) if name.startswith("single") else None,
        {
            "plain_mib_s": _rate(plain).value,
            "ratio_to_plain": _rate(ours).value / _rate(plain).value,
            "ratio_min": min(a.rate / b.rate for a, b in zip(ours, own, strict=True)),
            "ratio_max": max(a.rate / b.rate for a, b in zip(ours, own, strict=True)),
        },
        _limit_of_rate(name, _rate(ours).value, _rate(plain).value),
    )


def _limit_of_rate(name: str, rate: float, plain: float) -> str:
    """What limits the rate of a single layer, in MiB/s, beside QEMU's own LUKS."""
    if rate > _NEAR * plain:
        return f"the storage: a plain image reaches {plain:.0f} MiB/s"
    if name.endswith("qcow2"):
        return "QEMU's own LUKS uses all cores for qcow2, the library needs one"
    return "copies between QEMU and the page cache"


def _rate(samples: Sequence[_Sample]) -> Measurement:
    return Measurement.median([each.rate / _MIB for each in samples], Unit.MIB_PER_SECOND)


def _run(image: _Image, direction: str, size: int, cache: str) -> _Sample:
    """Let qemu-img write or read the whole image once, from or to QEMU's null driver."""
    if image.deks:
        options = unlocking.image_options(image.path, image.format, len(image.deks))
    else:
        options = f"driver={image.format.value},file.driver=file,file.filename={image.path}"
    null = f"driver=null-co,size={size},read-zeroes=off"
    source, target = (null, options) if direction == "write" else (options, null)
    caches = ["-t", cache] if direction == "write" else ["-T", cache]
    with unlocking.secrets_for(image.deks) as (secrets, descriptors):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            ["qemu-img", "convert", "-W", "-n", "-S", "0", *caches, *secrets]
            + ["--image-opts", "--target-image-opts"]
            + [source, target],
            pass_fds=descriptors,
            env={**os.environ, **image.environment},
            check=True,
        )
        took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Sample(spent * _GIB / size, size / took)
