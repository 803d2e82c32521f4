"""Key rotation: disks rewrapped per second, against the bare writes and syncs of a rotation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from hosts import private_backend
from measurement import Measurement, Row, Run, Unit, seconds
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.model.disks import PLATFORM_KEY, NewDisk

_ENVELOPE = 1024
_RECORD = 8 << 10
"""Approximate size in bytes of a one-row commit in SQLite's write-ahead log."""


def measure(bench: Run) -> Iterator[Row]:
    """Rotate the platform's key for many disks; three syncs per disk: its row, and its envelope twice."""
    count = bench.amount(200, quick=40)
    with private_backend(bench.scratch / "rewrap") as backend:
        for index in range(count):
            backend.disks.create(NewDisk(name=f"disk-{index}", size=1 << 20))
        turns = [(_rotate(backend, count), _bare(bench.scratch, count)) for _ in range(3)]
    ours, peer = (
        Measurement.median([count / took for took in samples], Unit.DISKS_PER_SECOND)
        for samples in zip(*turns, strict=True)
    )
    yield Row(
        "rewrap/platform-managed",
        f"rotate the platform's key, {count} disks",
        ours,
        peer,
        "three bare writes and fsyncs per disk",
        details={"ms_per_disk": 1000 / ours.value},
    )


def _rotate(backend: Backend, count: int) -> float:
    def rotate() -> None:
        _, report = backend.keys.rotate(PLATFORM_KEY)
        if report.rewrapped != count:
            raise LabError(f"{report.rewrapped} of {count} disks were rewrapped")

    return seconds(rotate)


def _bare(folder: Path, count: int) -> float:
    """Duration of the same number of bare writes and syncs, in two files."""
    files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("log", "image")]
    try:
        return seconds(lambda: _write_and_sync(files, count))
    finally:
        for file in files:
            os.close(file)


def _write_and_sync(files: Sequence[int], count: int) -> None:
    log, image = files
    for index in range(count):
        os.pwrite(log, os.urandom(_RECORD), index * _RECORD)
        os.fsync(log)
        for slot in range(2):
            os.pwrite(image, os.urandom(_ENVELOPE), slot * _ENVELOPE)
            os.fsync(image)
