"""Snapshots of a running guest's disk: a full one, and an incremental one of what changed since."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt_qemu

from hosts import prepared_host
from measurement import Measurement, Row, Run
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.lab import acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk

_NAME, _DISK = "snapshot", "bench"
_ROUNDS = 3
_CHANGED = 50
_DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"


def measure(bench: Run) -> Iterator[Row]:
    """Take a full and some incremental snapshots by the command, its start included."""
    mebibytes = bench.amount(1024, quick=128)
    with prepared_host() as (host, backend):
        for image_format in DiskFormat:
            yield from _rows(bench, host, backend, image_format, mebibytes)


def _rows(
    bench: Run, host: LabHost, backend: Backend, image_format: DiskFormat, mebibytes: int
) -> Iterator[Row]:
    source = bench.scratch / "random.raw"
    with source.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
    backend.transfer.import_image(NewDisk(name=_DISK, format=image_format), source, source_format="raw")
    source.unlink()
    element = backend.domains.disk_element(_DISK)
    guest = Guest(host, _NAME, acceleration=acceleration.probe("boot-sector", slow_kvm=True), disks=[element])
    guest.start()
    qemu = _qemu()
    full = _Sample.of(host, qemu, "s0")
    increments = []
    for number in range(1, _ROUNDS + 1):
        _write(host, f"write -P {number} {number}M {_CHANGED}M")
        increments.append(_Sample.of(host, qemu, f"s{number}"))
    guest.destroy()
    guest.undefine()
    for number in reversed(range(_ROUNDS + 1)):
        backend.snapshots.delete(f"s{number}")
    backend.disks.delete(_DISK)
    for name, what, samples in (
        ("full", f"full snapshot of {mebibytes} MiB, {image_format.value}, guest running", [full]),
        (
            "incremental",
            f"incremental snapshot of {mebibytes} MiB, {_CHANGED} MiB changed, {image_format.value}",
            increments,
        ),
    ):
        last = samples[-1]
        yield Row(
            f"snapshot/{name}-{image_format.value}",
            what,
            Measurement.median([each.seconds for each in samples]),
            details={
                "read_mib": last.read / (1 << 20),
                "cpu_s_per_gib": last.cpu_seconds / (last.copied / (1 << 30)),
                "pause_ms": 1000 * max(each.pause_seconds for each in samples),
            },
        )


class _Sample:
    """A snapshot.

    :ivar read: bytes that the guest's QEMU read from files.
    :ivar copied: bytes in the snapshot.
    :ivar cpu_seconds: busy time of all processors of the machine meanwhile.
    """

    def __init__(self, taken: dict[str, Any], seconds: float, read: int, cpu_seconds: float) -> None:
        (snapshot,) = taken["snapshots"]
        self.seconds = seconds
        self.read = read
        self.copied = int(snapshot.get("changed-bytes", snapshot["size"]))
        self.cpu_seconds = cpu_seconds
        self.pause_seconds = float(taken["pause-seconds"])

    @classmethod
    def of(cls, host: LabHost, qemu: int, name: str) -> _Sample:
        read, cpu, began = _read_by(qemu), _busy_seconds(), time.monotonic()
        done = subprocess.run(
            host.command(
                [Path(sys.executable).with_name("virt-sse"), "snapshot", "create", name, "--disk", _DISK]
                + ["--incremental", "--output", "json"]
            ),
            env=host.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"no snapshot: {done.stderr}")
        took = time.monotonic() - began
        return cls(json.loads(done.stdout), took, _read_by(qemu) - read, _busy_seconds() - cpu)


def _qemu() -> int:
    """The guest's QEMU, by its number out here."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"guest={_NAME},".encode() in path.read_bytes():
                return int(path.parent.name)
    raise LabError("the guest's QEMU is not found")


def _read_by(pid: int) -> int:
    words = Path(f"/proc/{pid}/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def _busy_seconds() -> float:
    user, nice, system, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _write(host: LabHost, command: str) -> None:
    with contextlib.closing(host.connect()) as connection:
        domain = connection.lookupByName(_NAME)
        flag = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        libvirt_qemu.qemuMonitorCommand(domain, f'qemu-io -d {_DEVICE} "{command}"', flag)
