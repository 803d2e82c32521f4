"""The configurations of disks that the benchmarks of the data path compare, and their exports over NBD."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hosts import dek_of, double_set
from storage_daemon import Export, exported
from virt_sse.backend import Backend
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import HostCaching, Placement
from virt_sse.system import acceleration
from virt_sse.system.tools import run

QEMU = User(64055, 64055)
"""User of QEMU for the stages; also the stages' own user if the host has no user for stages."""
_ENCRYPTION = {
    DiskFormat.QCOW2: "encrypt.format=luks,encrypt.key-secret=dek",
    DiskFormat.RAW: "key-secret=dek",
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A way to store the data of a disk.

    :ivar name: part of the names of rows.
    :ivar what: description.
    :ivar layers: number of LUKS layers; 0 for a plain image.
    :ivar is_accelerated: whether QEMU's processes load the XTS library; without, QEMU's own LUKS is measured,
        with the same settings of the allocator.
    :ivar caching: host cache below QEMU.
    :ivar placement: the process that decrypts the disk.
    :ivar aims: by name of a load, the smallest wanted ratio to a plain disk.
    """

    name: str
    what: str
    format: DiskFormat
    layers: int = 1
    is_accelerated: bool = True
    caching: HostCaching = HostCaching.NONE
    placement: Placement = Placement.GUEST
    aims: dict[str, float] = field(default_factory=dict)

    @property
    def is_direct(self) -> bool:
        """Whether QEMU opens the image itself, so that O_DIRECT can be measured: no stage does so."""
        return self.layers <= 1 and self.caching is HostCaching.NONE and self.placement is Placement.GUEST

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the QEMU process in place of the guest's."""
        return acceleration.environment() if self.layers and self.is_accelerated else acceleration.ALLOCATOR


def _aims(seq_write: float, seq_read: float, rand_write: float, rand_read: float) -> dict[str, float]:
    return {
        "seq-write": seq_write,
        "seq-read": seq_read,
        "rand-write": rand_write,
        "rand-read": rand_read,
    }


RAW, QCOW2 = DiskFormat.RAW, DiskFormat.QCOW2
PLAIN = {
    image_format: Configuration(f"plain-{image_format.value}", f"plain {image_format.value}", image_format, 0)
    for image_format in (RAW, QCOW2)
}
CONFIGURATIONS = (
    *PLAIN.values(),
    Configuration("own-raw", "raw, QEMU's own LUKS", RAW, is_accelerated=False),
    Configuration("own-qcow2", "qcow2, QEMU's own LUKS", QCOW2, is_accelerated=False),
    Configuration("single-raw", "raw, one layer", RAW, aims=_aims(0.65, 0.95, 0.9, 0.9)),
    Configuration("single-qcow2", "qcow2, one layer", QCOW2, aims=_aims(0.65, 0.95, 0.7, 0.8)),
    Configuration("double-raw", "raw, two layers", RAW, layers=2, aims=_aims(0.5, 0.6, 0.75, 0.75)),
    Configuration("double-qcow2", "qcow2, two layers", QCOW2, layers=2),
    Configuration("storage-raw", "raw, one layer, placement storage", RAW, placement=Placement.STORAGE),
    Configuration(
        "double-storage-raw", "raw, two layers, placement storage", RAW, layers=2, placement=Placement.STORAGE
    ),
    Configuration(
        "read-only-raw",
        "raw, host cache ReadOnly",
        RAW,
        caching=HostCaching.READ_ONLY,
        aims={"rand-write": 0.7},
    ),
    Configuration("read-write-raw", "raw, host cache ReadWrite", RAW, caching=HostCaching.READ_WRITE),
    Configuration(
        "double-read-only-raw",
        "raw, two layers, host cache ReadOnly",
        RAW,
        layers=2,
        caching=HostCaching.READ_ONLY,
        aims={"rand-write": 0.7},
    ),
)
"""Each is compared with the plain disk of its format."""


class DiskMaker:
    """Makes the disks of configurations, and exports them over NBD.

    :param folder: for plain images and sockets.
    """

    def __init__(self, backend: Backend, folder: Path, size: int) -> None:
        self._backend = backend
        self._folder = folder
        self._size = size
        self._double = double_set(backend)
        for path in (backend.host.config.root, backend.host.config.disk_directory):
            path.chmod(0o711)  # the users of stage processes pass

    def plain(self, image_format: DiskFormat) -> Path:
        """A new plain image."""
        path = self._folder / f"{uuid.uuid4()}.{image_format.value}"
        create = ["qemu-img", "create", "-q", "-f", image_format.value, str(path), str(self._size)]
        run(create, confinement=None)
        return path

    def disk(self, configuration: Configuration) -> Disk:
        """A new disk with at least one layer."""
        new = NewDisk(
            name=f"{configuration.name}-{uuid.uuid4().hex[:8]}",
            size=self._size,
            format=configuration.format,
            encryption_set=self._double if configuration.layers > 1 else None,
        )
        return self._backend.disks.create(new)

    @contextlib.contextmanager
    def export(self, configuration: Configuration, *, direct: bool = False) -> Iterator[Export]:
        """The export of a new disk, as seen by the disk's guest: a storage daemon takes the guest's place.

        :param direct: whether to open the image with O_DIRECT; see :attr:`Configuration.is_direct`.
        """
        cache = "cache.direct=on,aio=native" if direct else "cache.direct=off,aio=threads"
        if not configuration.layers:
            path = self.plain(configuration.format)
            node = f"driver={configuration.format.value},discard=unmap,{_file(path, cache)}"
            try:
                with exported(node, self._folder, environment=configuration.environment) as export:
                    yield export
            finally:
                path.unlink()
            return
        disk = self.disk(configuration)
        try:
            with self._served(configuration, disk, cache) as export:
                yield export
        finally:
            disk.path.unlink()

    @contextlib.contextmanager
    def _served(self, configuration: Configuration, disk: Disk, cache: str) -> Iterator[Export]:
        host = self._backend.host
        plan = host.plugins.host_layer().cache(
            self._backend.domains.plan(disk, configuration.placement), configuration.caching
        )
        is_plain = configuration.placement is Placement.STORAGE
        deks = {entry.slot: dek_of(self._backend, disk, entry.slot) for entry in disk.deks}
        with contextlib.ExitStack() as stack:
            host.stages.start(disk, plan, deks, domain_id=uuid.uuid4(), domain="bench", qemu=QEMU)
            stack.callback(host.stages.stop, disk.id)
            record = host.stages.record(disk.id)
            processes = host.stages.processes(record) if record else []
            file = _file(disk.path, cache)
            if processes:  # the gate of the guest's socket admits the domain's QEMU alone
                socket = processes[0].place.served.path
                file = f"file.driver=nbd,file.server.type=unix,file.server.path={socket}"
                file += f",file.export={plain_export(disk.id) if is_plain else disk.id}"
            layer = (
                "driver=raw" if is_plain else f"driver={disk.format.qemu_driver},{_ENCRYPTION[disk.format]}"
            )
            node = f"{layer},discard=unmap,{file}"
            below = [each.process.pid() for each in processes]
            yield stack.enter_context(
                exported(
                    node,
                    self._folder,
                    dek=None if is_plain else deks["service"],
                    below=[pid for pid in below if pid],
                    environment=configuration.environment,
                )
            )


def supports_direct(folder: Path) -> bool:
    """Whether the file system of *folder* supports O_DIRECT."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


def _file(path: Path, cache: str) -> str:
    filename = str(path).replace(",", ",,")
    options = ",".join(f"file.{option}" for option in cache.split(","))
    return f"file.driver=file,file.filename={filename},file.discard=unmap,{options}"
