"""Making a linked clone of an image: ``Images.new_clone`` against a plaintext overlay of qemu-img."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hosts import private_backend
from measurement import Measurement, Row, Run, Target, seconds
from virt_sse.model.disks import NewDisk
from virt_sse.system.tools import run

_SIZE = 20 << 30
_TARGET = Target(seconds=1.0)


def measure(bench: Run) -> Iterator[Row]:
    """Measure clones of a sparse image with one layer, in process."""
    with private_backend(bench.scratch / "clone") as backend:
        backend.disks.create(NewDisk(name="source", size=_SIZE))
        backend.images.create("image", "source")
        first, *ours = [
            seconds(partial(backend.images.new_clone, "image", NewDisk(name=f"clone-{index}")))
            for index in range(1 + bench.amount(15, quick=5))
        ]
        plain = bench.scratch / "plain.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(plain), str(_SIZE)], confinement=None)
        overlays = [seconds(partial(_overlay, plain, index)) for index in range(bench.amount(15, quick=5))]
    yield Row(
        "clone/qcow2",
        "make a linked clone of a 20 GiB image",
        Measurement.median(ours),
        Measurement.median(overlays),
        "qemu-img create with a backing file, without encryption",
        _TARGET,
        {"first_ms": first * 1000},
    )


def _overlay(plain: Path, index: int) -> None:
    overlay = plain.with_name(f"overlay-{index}.qcow2")
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(plain), str(overlay)],
        confinement=None,
    )
