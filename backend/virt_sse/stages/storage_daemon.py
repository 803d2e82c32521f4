"""Storage daemon: LUKS volumes, opened by a qemu-storage-daemon(1) apart from the guest's QEMU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from virt_sse.errors import StageError
from virt_sse.libvirt.users import ROOT
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.model.layers import StorageNode
from virt_sse.qemu.storage_daemon import NbdExport, StorageDaemon, arguments
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages.locked_process import Command
from virt_sse.stages.sockets import ListeningSocket
from virt_sse.stages.stage_process import ExpectedEvidence, ImageSource, RecordField, StageProcess
from virt_sse.system import acceleration
from virt_sse.system.confinement import RESOLVER
from virt_sse.system.rbd_names import is_rbd

_Slots = Annotated[list[str], msgspec.Meta(min_length=2)]
"""Of several nodes, guest first."""


class StorageDaemonProcess(StageProcess[StorageNode]):
    """A qemu-storage-daemon process: gets the image's path, or the image's export, and the DEKs by QMP."""

    name = "storage"
    title = "storage daemon"
    stage_type = StorageNode
    serves_several = True
    record_field = RecordField("storage_slot", str | _Slots | None)
    inner_socket = "nbd"
    is_qemu = True

    @classmethod
    def to_record(cls, stages: Sequence[StorageNode]) -> str | list[str] | None:
        slots = [stage.slot for stage in stages]
        return slots if len(slots) > 1 else slots[0] if slots else None

    @classmethod
    def from_record(cls, value: object) -> Sequence[StorageNode]:
        slots = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(StorageNode(str(slot)) for slot in slots)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(stage.slot for stage in self.stages)

    @property
    def keeps_acknowledged_writes(self) -> bool:
        """Raw writes are in the kernel's page cache; qcow2 metadata stays in the process until a flush.

        So do writes to Ceph, in librbd's cache.
        """
        return self.place.format is DiskFormat.RAW and not self.has_network

    def sockets(self) -> Sequence[ListeningSocket]:
        return [self.place.served, ListeningSocket(self._daemon.monitor, ROOT)]

    def command(self, listening: Sequence[int]) -> Command:
        served, monitor = listening
        library, base = acceleration.library(), self.place.base
        return Command(
            arguments(monitor, served),
            [monitor, served],
            environment=acceleration.environment(),
            readable=[path for path in (library, base) if path] + ([*RESOLVER] if self.has_network else []),
            has_network=self.has_network,
        )

    def await_serving(self, deks: Sequence[Dek], base: BaseImage | None = None) -> None:
        if not deks:
            raise StageError("a storage daemon needs a DEK")
        source = self.place.source
        stored = source.path if isinstance(source, ImageSource) else NbdExport(source.socket, source.export)
        self._daemon.open_volumes(stored, self.place.format, deks, self.place.export, base=base)

    def growable(self) -> StorageDaemon:
        return self._daemon

    @property
    def has_network(self) -> bool:
        source = self.place.source
        return isinstance(source, ImageSource) and is_rbd(source.path)

    def evidence(self) -> ExpectedEvidence:
        if self.place.decrypts_all:
            data = "the storage daemon's memory"
        else:
            data = "the storage daemon's memory: ciphertext of the guest's layer"
        return ExpectedEvidence(data=data, is_plaintext=self.place.decrypts_all, monitor=self._daemon)

    @property
    def _daemon(self) -> StorageDaemon:
        return StorageDaemon(self.place.folder / "qmp")
