"""Storage daemon: a second LUKS volume, opened by a qemu-storage-daemon(1) apart from the guest's QEMU."""

from __future__ import annotations

from collections.abc import Sequence

from virt_sse.errors import StageError
from virt_sse.libvirt.users import ROOT
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.model.layers import StorageNode
from virt_sse.qemu.storage_daemon import StorageDaemon, arguments
from virt_sse.stages.locked_process import Command
from virt_sse.stages.sockets import ListeningSocket
from virt_sse.stages.stage_process import ExpectedEvidence, ImageSource, RecordField, StageProcess
from virt_sse.system import acceleration


class StorageDaemonProcess(StageProcess[StorageNode]):
    """A qemu-storage-daemon process, which gets the image's path and the DEK through its monitor."""

    name = "storage"
    title = "storage daemon"
    stage_type = StorageNode
    record_field = RecordField("storage_slot", str | None)
    inner_socket = "nbd"
    is_qemu = True

    @classmethod
    def to_record(cls, stage: StorageNode | None) -> str | None:
        return stage.slot if stage else None

    @classmethod
    def from_record(cls, value: object) -> StorageNode | None:
        return None if value is None else StorageNode(str(value))

    @property
    def slot(self) -> str:
        return self.stage.slot

    @property
    def keeps_acknowledged_writes(self) -> bool:
        """Raw writes are in the kernel's page cache; qcow2 metadata stays in the process until a flush."""
        return self.place.format is DiskFormat.RAW

    def sockets(self) -> Sequence[ListeningSocket]:
        return [self.place.served, ListeningSocket(self._daemon.monitor, ROOT)]

    def command(self, listening: Sequence[int]) -> Command:
        served, monitor = listening
        library = acceleration.library()
        return Command(
            arguments(monitor, served),
            [monitor, served],
            environment=acceleration.environment(),
            readable=[library] if library else [],
        )

    def await_serving(self, dek: Dek | None) -> None:
        source = self.place.source
        if dek is None or not isinstance(source, ImageSource):
            raise StageError("a storage daemon needs a DEK and the disk's image")
        self._daemon.open_volume(source.path, self.place.format, dek, self.place.disk_id)

    def growable(self) -> StorageDaemon:
        return self._daemon

    def evidence(self) -> ExpectedEvidence:
        return ExpectedEvidence(
            data="the storage daemon's memory: ciphertext of the guest's layer", monitor=self._daemon
        )

    @property
    def _daemon(self) -> StorageDaemon:
        return StorageDaemon(self.place.folder / "qmp")
