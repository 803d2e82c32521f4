"""The data path through two layers, host caches and a storage daemon: against a single layer, and plain.

A storage daemon with the LUKS node takes the place of the guest's QEMU; all stages below are the real stages.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import ENCRYPTION, FILL, LOADS, rate
from hosts import dek_of, double_set, private_backend
from measurement import Row, Run
from storage_daemon import Export, drive, exported, require_tools
from virt_sse.backend import Backend
from virt_sse.lab.requirements import require
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.layers import HostCaching, LayerChoice, Placement
from virt_sse.system.tools import run

_MIB = 1 << 20
_QEMU = User(64055, 64055)
"""User of QEMU for the stages; also the stages' own user if the host has no user for stages."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A stack of stages."""

    what: str
    is_double: bool = False
    caching: HostCaching = HostCaching.NONE
    placement: Placement = Placement.GUEST


_WAYS = {
    "double": _Way("two layers", is_double=True),
    "storage": _Way("placement storage", placement=Placement.STORAGE),
    "double-storage": _Way("two layers, placement storage", is_double=True, placement=Placement.STORAGE),
    "read-only": _Way("host cache ReadOnly", caching=HostCaching.READ_ONLY),
    "read-write": _Way("host cache ReadWrite", caching=HostCaching.READ_WRITE),
    "double-read-only": _Way(
        "two layers, host cache ReadOnly", is_double=True, caching=HostCaching.READ_ONLY
    ),
}


def measure(bench: Run) -> Iterator[Row]:
    """Measure both formats with four loads through each stack in turn, in the page cache as under libvirt."""
    require_tools()
    require("nbdkit")
    size = bench.amount(256, quick=96) * _MIB
    folder = bench.scratch / "plain-layers"
    folder.mkdir()
    with private_backend(bench.scratch / "l") as backend:
        backend.host.config.root.chmod(0o711)
        backend.host.config.disk_directory.chmod(0o711)
        double = double_set(backend)
        for image_format in [DiskFormat.QCOW2] if bench.quick else DiskFormat:
            with contextlib.ExitStack() as stack:
                yield from _measure_format(bench, stack, backend, image_format, size, folder, double)
            for path in (*folder.iterdir(), *backend.host.config.disk_directory.iterdir()):
                path.unlink()


def _measure_format(
    bench: Run,
    stack: contextlib.ExitStack,
    backend: Backend,
    image_format: DiskFormat,
    size: int,
    folder: Path,
    double: str,
) -> Iterator[Row]:
    name = image_format.value
    plain = folder / f"disk.{name}"
    run(["qemu-img", "create", "-q", "-f", name, str(plain), str(size)], confinement=None)
    exports = {
        "plain": stack.enter_context(
            exported(f"driver={name},file.driver=file,file.filename={plain},discard=unmap", folder)
        )
    }
    for name_of_way, way in {"single": _Way("single"), **_WAYS}.items():
        disk = backend.disks.create(
            NewDisk(
                name=f"{name}-{name_of_way}",
                size=size,
                format=image_format,
                encryption_set=double if way.is_double else None,
            )
        )
        exports[name_of_way] = stack.enter_context(_served(backend, disk, way, folder))
    for export in exports.values():
        drive(export, FILL, size, runtime=None)
    for load_name, (description, load) in LOADS.items():
        found = {
            each: drive(export, load, size, runtime=bench.amount(2, quick=1))
            for each, export in exports.items()
        }
        for name_of_way, way in _WAYS.items():
            yield Row(
                f"layers/{name}/{name_of_way}/{load_name}",
                f"{name}, {way.what}, {description}",
                rate(found[name_of_way]),
                rate(found["single"]),
                "a single layer",
                details={
                    "plain_mib_s": rate(found["plain"]).value,
                    "cpu_s_per_gib": found[name_of_way].cpu_seconds_per_gib,
                    "peer_cpu_s_per_gib": found["single"].cpu_seconds_per_gib,
                    "plain_cpu_s_per_gib": found["plain"].cpu_seconds_per_gib,
                },
            )


@contextlib.contextmanager
def _served(backend: Backend, disk: Disk, way: _Way, folder: Path) -> Iterator[Export]:
    """Export of the disk as seen by its guest, on top of the disk's running stages."""
    layer = backend.host.plugins.encryption_layer(disk.encryption_type)
    plan = layer.plan(LayerChoice(PLATFORM_KEY, disk.deks[-1].cipher, way.placement))
    plan = backend.host.plugins.host_layer().cache(plan, way.caching)
    is_plain = way.placement is Placement.STORAGE
    deks = {entry.slot: dek_of(backend, disk, entry.slot) for entry in disk.deks}
    stages = backend.host.stages
    with contextlib.ExitStack() as stack:
        stages.start(disk, plan, deks, domain_id=uuid.uuid4(), domain="bench", qemu=_QEMU)
        stack.callback(stages.stop, disk.id)
        if is_plain or len(plan.stages) > 1:
            socket = stages.guest_socket(disk.id)
            file = {
                "driver": "nbd",
                "server.type": "unix",
                "server.path": str(socket),
                "export": plain_export(disk.id) if is_plain else str(disk.id),
            }
        else:
            file = {"driver": "file", "filename": str(disk.path)}
        layer_of_guest = f"driver={disk.format.qemu_driver},{ENCRYPTION[disk.format]}"
        node = f"{'driver=raw' if is_plain else layer_of_guest},discard=unmap,"
        node += ",".join(f"file.{option}={value}" for option, value in file.items())
        below = _pids(backend, disk)
        yield stack.enter_context(
            exported(node, folder, dek=None if is_plain else deks["service"], below=below)
        )


def _pids(backend: Backend, disk: Disk) -> list[int]:
    record = backend.host.stages.record(disk.id)
    processes = backend.host.stages.processes(record) if record else []
    return [pid for each in processes if (pid := each.process.pid())]
