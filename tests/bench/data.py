"""The data path: an encrypted disk against a plain disk, through an NBD export of QEMU's storage daemon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hosts import dek_of, private_backend
from measurement import Measurement, Row, Run, Unit
from storage_daemon import Export, Load, Throughput, drive, exported, require_tools
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.system.tools import run

_MIB = 1 << 20
ENCRYPTION = {
    DiskFormat.QCOW2: "encrypt.format=luks,encrypt.key-secret=dek",
    DiskFormat.RAW: "key-secret=dek",
}
FILL = Load("write", _MIB)
LOADS = {
    "seq-write": ("sequential write, 1 MiB", Load("write", _MIB)),
    "seq-read": ("sequential read, 1 MiB", Load("read", _MIB)),
    "rand-write": ("random write, 4 KiB", Load("randwrite", 4096)),
    "rand-read": ("random read, 4 KiB", Load("randread", 4096)),
}


def measure(bench: Run) -> Iterator[Row]:
    """Measure both formats with four loads, on allocated clusters; plain and encrypted in turns."""
    require_tools()
    size = bench.amount(512, quick=192) * _MIB
    folder = bench.scratch / "plain"
    folder.mkdir()
    cache = _cache(folder)
    with private_backend(bench.scratch / "data") as backend:
        for image_format in DiskFormat:
            plain = folder / f"disk.{image_format.value}"
            run(
                ["qemu-img", "create", "-q", "-f", image_format.value, str(plain), str(size)],
                confinement=None,
            )
            disk = backend.disks.create(NewDisk(name=image_format.value, size=size, format=image_format))
            luks = f"driver={image_format.qemu_driver},{ENCRYPTION[image_format]}"
            with contextlib.ExitStack() as stack:
                ours = stack.enter_context(
                    exported(f"{luks},{_file(disk.path, cache)}", folder, dek=dek_of(backend, disk))
                )
                peer = stack.enter_context(
                    exported(f"driver={image_format.value},{_file(plain, cache)}", folder)
                )
                yield from _rows(bench, image_format.value, ours, peer, size, direct="native" in cache)
            plain.unlink()
            disk.path.unlink()


def _rows(bench: Run, name: str, ours: Export, peer: Export, size: int, *, direct: bool) -> Iterator[Row]:
    for export in (peer, ours):
        drive(export, FILL, size, runtime=None)
    for load_name, (description, load) in LOADS.items():
        plain, encrypted = (
            drive(export, load, size, runtime=bench.amount(3, quick=1)) for export in (peer, ours)
        )
        yield Row(
            f"data/{name}/{load_name}",
            f"{name}, {description}",
            rate(encrypted),
            rate(plain),
            f"plain disk, {'O_DIRECT' if direct else 'page cache'}",
            details={
                "cpu_s_per_gib": encrypted.cpu_seconds_per_gib,
                "peer_cpu_s_per_gib": plain.cpu_seconds_per_gib,
            },
        )


def rate(throughput: Throughput) -> Measurement:
    return Measurement(throughput.bytes_per_second / _MIB, Unit.MIB_PER_SECOND)


def _cache(folder: Path) -> str:
    """Cache options: direct I/O if supported by the file system, to measure the disk, not the page cache."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return "file.cache.direct=off,file.aio=threads"
    else:
        return "file.cache.direct=on,file.aio=native"
    finally:
        probe.unlink()


def _file(path: Path, cache: str) -> str:
    filename = str(path).replace(",", ",,")
    return f"file.driver=file,file.filename={filename},{cache}"
