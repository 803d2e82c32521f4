"""``disk import`` of an image, against qemu-img with its default settings and without the XTS library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hosts import private_backend
from measurement import Measurement, Row, Run, Target, seconds
from virt_sse.backend import Backend
from virt_sse.errors import LabUnavailableError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.qemu import conversion
from virt_sse.system import acceleration

_MIB = 1 << 20


def measure(bench: Run) -> Iterator[Row]:
    """Import an image without holes, in interleaved rounds.

    :raise LabUnavailableError: When the library cannot be used.
    """
    if reason := acceleration.obstacle():
        raise LabUnavailableError(f"the XTS library: {reason}")
    size = bench.amount(2048, quick=64) * _MIB
    source = bench.scratch / "source.raw"
    with source.open("wb") as file:
        block = os.urandom(_MIB)
        for _ in range(size // _MIB):
            file.write(block)
    with private_backend(bench.scratch / "transfer") as backend:
        for image_format in (DiskFormat.RAW, DiskFormat.QCOW2):
            rounds = [
                (_import(backend, source, image_format), _import_plainly(backend, source, image_format))
                for _ in range(bench.amount(3, quick=1))
            ]
            ours, without = (Measurement.median(samples) for samples in zip(*rounds, strict=True))
            yield Row(
                f"import/{image_format.value}",
                f"disk import, {size // _MIB} MiB to {image_format.value}",
                ours,
                without,
                "in order, without the XTS library",
                Target(ratio=2.5),
                {},
                "reading and writing the page cache on the same cores",
            )
    source.unlink()


def _import(backend: Backend, source: Path, image_format: DiskFormat) -> float:
    new = NewDisk(name="imported", format=image_format)
    took = seconds(lambda: backend.transfer.import_image(new, source, source_format="raw"))
    backend.disks.erase(backend.disks.get("imported"), dry_run=False)
    return took


def _import_plainly(backend: Backend, source: Path, image_format: DiskFormat) -> float:
    convert = ("qemu-img", "convert", "-p")
    with (
        mock.patch.object(acceleration, "library", return_value=None),
        mock.patch.object(conversion, "_CONVERT", convert),
    ):
        return _import(backend, source, image_format)
