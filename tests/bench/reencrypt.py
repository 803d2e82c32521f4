"""Re-encryption under a running guest, beside libvirt's bare block copy between two LUKS images."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing

from hosts import prepared_host
from measurement import Measurement, Row, Run, Target, Unit, seconds
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.lab import acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import linux_micro
from virt_sse.libvirt import domains
from virt_sse.libvirt.block_copy import BlockCopy
from virt_sse.libvirt.disk_element import disk_element
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.replacement.offline import no_bars
from virt_sse.replacement.reencryption import Reencryption
from write_latency import SCRIPT, WriteLatency

_NAME, _TARGET = "reencrypt", "vda"
_POLL_SECONDS = 0.02


def measure(bench: Run) -> Iterator[Row]:
    """Copy a full disk in turns; ours includes the new disk, the pivot and the erasure of the old disk."""
    mebibytes = bench.amount(1024, quick=128)
    with prepared_host() as (host, backend):
        for image_format in DiskFormat:
            yield _row(bench, host, backend, image_format, mebibytes)
            yield _latency_row(bench, host, backend, image_format)


def _row(bench: Run, host: LabHost, backend: Backend, image_format: DiskFormat, mebibytes: int) -> Row:
    name = _full_disk(bench, backend, image_format, mebibytes)
    element = backend.domains.disk_element(name, target=_TARGET)
    guest = Guest(host, _NAME, acceleration=acceleration.probe("boot-sector", slow_kvm=True), disks=[element])
    guest.start()
    pauses, ours, peer = [], [], []
    for _ in range(3):
        began = time.monotonic()
        done = backend.reencryption.reencrypt(name, Reencryption(), no_bars)
        ours.append(mebibytes / (time.monotonic() - began))
        pauses.append(done.paused_seconds or 0.0)
        peer.append(mebibytes / _bare(host, backend, image_format, mebibytes << 20))
    guest.destroy()
    guest.undefine()
    backend.disks.delete(name)
    return Row(
        f"reencrypt/{image_format.value}",
        f"re-encrypt {mebibytes} MiB under a running guest, {image_format.value}",
        Measurement.median(ours, Unit.MIB_PER_SECOND),
        Measurement.median(peer, Unit.MIB_PER_SECOND),
        "libvirt's block copy into an empty LUKS image, without a pivot",
        target=Target(ratio=0.9),
        details={"pause_ms": Measurement.median(pauses).value * 1000},
    )


def _latency_row(bench: Run, host: LabHost, backend: Backend, image_format: DiskFormat) -> Row:
    """Copy a full disk at a fixed rate in turns, under a Linux guest that writes all the time."""
    mebibytes, rate = bench.amount(256, quick=64), 64 << 20
    name = _full_disk(bench, backend, image_format, mebibytes)
    element = backend.domains.disk_element(name, target=_TARGET)
    guest = Guest(
        host, _NAME, acceleration=acceleration.probe("linux-micro"), disks=[element], boot=linux_micro()
    )
    guest.start(SCRIPT)
    guest.wait_for("linux-micro: begin")
    time.sleep(1)
    ours, peer, alone = [], [], []
    for _ in range(bench.amount(5, quick=1)):
        latency = WriteLatency(host, _NAME)
        time.sleep(mebibytes / (rate >> 20))
        alone.append(latency.percentile(99))
        latency = WriteLatency(host, _NAME)
        backend.reencryption.reencrypt(name, Reencryption(max_rate=rate), no_bars)
        ours.append(latency.percentile(99))
        latency = WriteLatency(host, _NAME)
        _bare(host, backend, image_format, mebibytes << 20, max_rate=rate)
        peer.append(latency.percentile(99))
    guest.destroy()
    guest.undefine()
    backend.disks.delete(name)
    return Row(
        f"reencrypt/{image_format.value}/write-latency",
        f"p99 of a guest's 4 KiB writes during re-encryption at {rate >> 20} MiB/s, {image_format.value}",
        Measurement.median(ours),
        Measurement.median(peer),
        "libvirt's block copy into an empty LUKS image at the same rate",
        target=Target(ratio=0.5),
        details={"without_a_copy_ms": Measurement.median(alone).value * 1000},
    )


def _full_disk(bench: Run, backend: Backend, image_format: DiskFormat, mebibytes: int) -> str:
    """A disk full of random bytes; its name."""
    source = bench.scratch / "random.raw"
    with source.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
    name = f"bench-{image_format.value}"
    backend.transfer.import_image(NewDisk(name=name, format=image_format), source, source_format="raw")
    source.unlink()
    return name


def _bare(
    host: LabHost, backend: Backend, image_format: DiskFormat, size: int, *, max_rate: int | None = None
) -> float:
    """Duration of a block copy of the guest's disk into another disk until both are the same."""
    spare = backend.disks.create(NewDisk(name="spare", size=size, format=image_format))
    took = seconds(lambda: _copy_into(host, backend, spare, max_rate))
    backend.disks.delete("spare")
    return took


def _copy_into(host: LabHost, backend: Backend, spare: Disk, max_rate: int | None) -> None:
    with closing(host.connect()) as connection:
        domain = domains.lookup(connection, _NAME)
        source = backend.domains.source(spare)
        backend.domains.serve(connection, domains.definition(domain), [source.use(_TARGET)])
        job = BlockCopy(domain, _TARGET)
        job.start(disk_element(source, target=_TARGET), max_rate=max_rate)
        while True:
            chain = job.chain()
            if chain is None or not chain.mirror:
                raise LabError("the block copy has ended")
            if chain.mirror_ready:
                break
            time.sleep(_POLL_SECONDS)
        job.abort()
