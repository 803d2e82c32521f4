"""The stage processes of this host's disks as recorded, running or not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.libvirt.users import ROOT
from virt_sse.stages import sockets
from virt_sse.stages.gate_process import GateProcess
from virt_sse.stages.hand_over_process import HAND_OVER, HandOverProcess
from virt_sse.stages.kinds import StageKinds, by_process
from virt_sse.stages.record import StageRecord
from virt_sse.stages.sockets import ListeningSocket
from virt_sse.stages.stage_process import ExportSource, ImageSource, StagePlace, StageProcess
from virt_sse.stages.storage_daemon import StorageDaemonProcess

_log = logging.getLogger(__name__)


class RecordedStages:
    """The records of a host's stage processes, and the processes that a record describes.

    :ivar kinds: the kinds of stage processes, guest first.
    """

    def __init__(self, config: Config, kinds: StageKinds) -> None:
        self._config = config
        self.kinds = kinds

    def guest_socket(self, disk_id: UUID) -> Path:
        """The socket at which a guest's QEMU finds the disk."""
        return sockets.guest_socket(self._sockets(disk_id))

    def records(self, damaged: Callable[[StageError], object] = lambda _: None) -> list[StageRecord]:
        """The records of all disks with stage processes, running or not.

        :param damaged: called for each unreadable record; these records are left out.
        """
        found = []
        for folder in self._folders():
            try:
                record = StageRecord.read(folder, self.kinds)
            except StageError as exc:
                damaged(exc)
            except Exception as exc:  # noqa: BLE001 -- one record must not stop those of other disks
                _log.exception("damaged stage record in %s", folder)
                damaged(StageError(f"damaged stage record in {folder}: {type(exc).__name__}"))
            else:
                found += [record] if record else []
        return found

    def _folders(self) -> list[Path]:
        try:
            return sorted(self._config.stage_directory.iterdir())
        except FileNotFoundError:
            return []

    def record(self, disk_id: UUID) -> StageRecord | None:
        """The record of a disk; ``None`` if the disk has no stage processes.

        :raise StageError: When the record is damaged.
        """
        return StageRecord.read(self._folder(disk_id), self.kinds)

    def processes(self, record: StageRecord) -> list[StageProcess[Any]]:
        """The stage processes of *record*, guest first, running or not."""
        found: list[StageProcess[Any]] = []
        source: ImageSource | ExportSource = ImageSource(record.image)
        groups = by_process(record.stages, self.kinds)
        for position, (kind, stages) in reversed(list(enumerate(groups))):
            user = record.user(kind.name)
            if position == 0 and record.gated:
                served = ListeningSocket(sockets.gated_socket(self._folder(record.disk_id)), ROOT)
            elif position == 0:
                served = self._guest_listening(record)
            else:
                path = sockets.inner_socket(self._sockets(record.disk_id), kind.inner_socket)
                client, _ = groups[position - 1]
                served = ListeningSocket(path, record.user(client.name))
            place = StagePlace(
                disk_id=record.disk_id,
                format=record.format,
                source=source,
                served=served,
                export=record.export if position == 0 else str(record.disk_id),
                decrypts_all=record.guest_slot is None,
                user=user,
                is_own_user=self._config.storage_user is None and user.uid in self._config.storage_uids,
                folder=self._folder(record.disk_id),
                cache_directory=self._config.cache_directory,
                base=record.base.path if record.base else None,
            )
            found.insert(0, kind(stages, place))
            source = ExportSource(served.path, place.export)
        return found

    def gate(self, record: StageRecord) -> GateProcess | None:
        """The gate before the stage processes of *record*, running or not; ``None`` if made without."""
        if not record.gated:
            return None
        return GateProcess(
            folder=self._folder(record.disk_id),
            guest=self._guest_listening(record),
            qemu_pid_file=self._config.qemu_pid_file(record.domain),
        )

    def hand_over(self, record: StageRecord) -> HandOverProcess | None:
        """The hand-over of the image of *record* to or from another host, begun or not.

        ``None`` for a disk that cannot be handed over: with a host cache, or in Ceph.
        """
        daemon = self.processes(record)[-1]
        if not isinstance(daemon, StorageDaemonProcess) or daemon.has_network:
            return None
        path = sockets.inner_socket(self._sockets(record.disk_id), HAND_OVER)
        return HandOverProcess(
            record=record,
            daemon=daemon,
            folder=self._folder(record.disk_id),
            listening=ListeningSocket(path, daemon.place.user),
        )

    def dead(self, record: StageRecord) -> list[str]:
        """The names of dead processes of *record*."""
        return [each.name for each in self.processes(record) if each.process.pid() is None]

    def lacks_gate(self, record: StageRecord) -> bool:
        """Whether the gate of *record* has died: the guest cannot connect again then."""
        gate = self.gate(record)
        return gate is not None and gate.process.pid() is None

    def dek_slots(self, record: StageRecord) -> list[str]:
        """Slots of the DEKs for the processes of *record*."""
        return [slot for each in self.processes(record) for slot in each.slots]

    def may_restart(self, record: StageRecord) -> bool:
        """Whether acknowledged writes outlive all processes of *record*; if so, a restart loses nothing."""
        return all(each.keeps_acknowledged_writes for each in self.processes(record))

    def _damage(self, disk_id: UUID) -> str | None:
        """The reason why the disk's record cannot be read, if so."""
        try:
            self.record(disk_id)
        except StageError as exc:
            return str(exc)
        return None

    def _guest_listening(self, record: StageRecord) -> ListeningSocket:
        return ListeningSocket(self.guest_socket(record.disk_id), record.qemu)

    def _sockets(self, disk_id: UUID) -> Path:
        return self._config.socket_directory / str(disk_id)

    def _folder(self, disk_id: UUID) -> Path:
        return self._config.stage_directory / str(disk_id)
