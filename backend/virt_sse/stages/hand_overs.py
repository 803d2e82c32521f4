"""Hand-overs of this host's disks to and from other hosts, while the disks' guests migrate."""

from __future__ import annotations

from collections.abc import Mapping, Set
from uuid import UUID

from virt_sse.errors import StageError
from virt_sse.model.keys import Dek
from virt_sse.stages.hand_over import HOLDING, LEAVING
from virt_sse.stages.record import StageRecord
from virt_sse.stages.stages import Stages


class HandOvers:
    """The hand-overs of the disks with a storage daemon; see :mod:`~virt_sse.stages.hand_over`."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def is_pending(self, record: StageRecord) -> bool:
        """Whether a hand-over has begun and has not ended."""
        hand_over = self._stages.hand_over(record)
        return hand_over is not None and hand_over.state is not None

    def is_held(self, record: StageRecord) -> bool:
        """Whether the image is closed, and the guest, if there, has sent no request for data since."""
        hand_over = self._stages.hand_over(record)
        return hand_over is not None and hand_over.state == HOLDING

    def leave(self, disk_id: UUID, deks: Mapping[str, Dek]) -> bool:
        """Hand a disk's image over: its guest migrates to another host, and runs here no more.

        The guest's next request for data takes the image back, if no other host has the image: the migration
        has failed. Does nothing for a disk that is being handed over.

        :param deks: by slot.
        :return: whether a hand-over began.
        :raise StageError: When the hand-over cannot begin.
        :raise MonitorError: When the storage daemon fails.
        """
        with self._stages.locked(disk_id) as record:
            if record is None or self._stages.dead(record) or self.is_pending(record):
                return False
            if (hand_over := self._stages.hand_over(record)) is None:
                raise StageError(f"disk {disk_id} has a host cache, and cannot be handed over")
            try:
                hand_over.begin(LEAVING, [deks[slot] for slot in hand_over.daemon.slots])
            except OSError as exc:
                raise StageError(f"cannot hand over disk {disk_id}: {exc}") from exc
            return True

    def expect_guest(self, domain_id: UUID, *, but: Set[UUID] = frozenset()) -> None:
        """Hold all requests for the disks of a domain whose state is about to arrive from another host.

        :param but: disks that are not handed over.
        :raise StageError: When a hand-over has failed.
        """
        for record in self._stages.records():
            if record.domain_id != domain_id or record.disk_id in but:
                continue
            if hand_over := self._stages.hand_over(record):
                hand_over.begin_holding()

    def take(self, record: StageRecord, *, before: float) -> None:
        """Open the image of a guest that runs here and has sent no request since a migration, if so.

        :param before: only if requests are held since then, of ``time.time()``.
        """
        if hand_over := self._stages.hand_over(record):
            hand_over.take(before=before)

    def is_dead(self, record: StageRecord) -> bool:
        """Whether the process of a hand-over has died: requests of the guest wait for a new one."""
        hand_over = self._stages.hand_over(record)
        return hand_over is not None and hand_over.is_dead

    def restart(self, disk_id: UUID) -> bool:
        """Replace the killed process of a hand-over, unless the stage processes have died as well.

        :return: whether there is a new process.
        :raise StageError: When the process cannot be started.
        """
        with self._stages.locked(disk_id) as record:
            hand_over = self._stages.hand_over(record) if record else None
            if record is None or hand_over is None or not hand_over.is_dead or self._stages.dead(record):
                return False
            try:
                hand_over.start()
            except OSError as exc:
                raise StageError(f"cannot hand over disk {disk_id}: {exc}") from exc
            return True
