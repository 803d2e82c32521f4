"""Starts, restarts, grows and ends the stage processes of this host's disks; the same way for every kind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, StageError, VirtSseError
from virt_sse.libvirt.users import ROOT, User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import LayerPlan, Stage
from virt_sse.qemu import image_file, qcow2
from virt_sse.qemu.formatting import header_length
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages import sockets
from virt_sse.stages.gate_process import GATE, admitted_by
from virt_sse.stages.hand_over_process import HAND_OVER
from virt_sse.stages.kinds import STAGE_KINDS, StageKinds, by_process, guest_and_below, kind_of
from virt_sse.stages.lent_images import give_back, lent_base, return_images_of, take_back_base
from virt_sse.stages.locked_process import PATIENCE, LockedProcess
from virt_sse.stages.process_start import start_process
from virt_sse.stages.record import RecordedBase, StageRecord, age
from virt_sse.stages.recorded_stages import RecordedStages
from virt_sse.stages.storage_user import own_users, storage_user
from virt_sse.system.locks import DiskLocks

_log = logging.getLogger(__name__)

_USERS = UUID(int=0)
"""Stands for the user ids of the host's stage processes, among the locks of disks."""
LOST_WRITES = "unflushed writes are lost: the domain must be stopped and started"


class Stages(RecordedStages):
    """All stage processes of a host. Several commands may work on them at the same time."""

    def __init__(self, config: Config, *, kinds: StageKinds = STAGE_KINDS) -> None:
        super().__init__(config, kinds)
        self._locks = DiskLocks(config.stage_directory.parent / "stages.lock")

    @contextlib.contextmanager
    def locked(self, disk_id: UUID) -> Iterator[StageRecord | None]:
        """The record of a disk whose processes no other command starts or ends during the block.

        :raise StageError: When the record is damaged.
        """
        with self._locks.hold(disk_id, wait=True):
            yield self.record(disk_id)

    def restart_gate(self, disk_id: UUID) -> None:
        """Start a disk's gate again, if the gate has died and the stage processes have not.

        :raise StageError: When the gate cannot be started.
        """
        with self._locks.hold(disk_id, wait=True):
            record = self.record(disk_id)
            if record and not self.dead(record):
                self._restart_gate(record)

    def start(
        self,
        disk: Disk,
        plan: LayerPlan,
        deks: Mapping[str, Dek],
        *,
        domain_id: UUID,
        domain: str,
        qemu: User,
        replacing: UUID | None = None,
        base: BaseImage | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        """Start the processes for the stages of *plan* below the guest's; running processes are ended first.

        Does nothing for a plan without such stages.

        :param deks: by slot.
        :param qemu: user of the domain's QEMU.
        :param replacing: a stopped domain; its processes for the disk may be ended.
        :param base: the image below a linked clone.
        :param is_elsewhere: whether the guest still runs on another host, and is about to migrate here.
        :raise DiskInUseError: When a different domain has the disk, or a QEMU process has the image open.
        :raise StageError: When a process does not start, or the disk's record is damaged. No process of the
            disk runs then, except if the record is damaged: nothing is changed then.
        :raise VirtSseError: By meaning, likewise.
        """
        guest, below = guest_and_below(plan, self.kinds)
        if not below:
            return
        with self._locks.hold(disk.id, wait=True):
            before = self.record(disk.id)
            if before and before.domain_id not in (domain_id, replacing):
                raise DiskInUseError(f"disk {disk.name!r} is in use by domain {before.domain!r}")
            self._stop(disk.id, before)
            owner = self._owner(disk.path)
            under = self._recorded(base) if base else None
            try:
                with self._locks.hold(_USERS, wait=True):
                    users = self._choose_users(disk.id, below, qemu)
                    record = StageRecord(
                        disk_id=disk.id,
                        domain_id=domain_id,
                        domain=domain,
                        image=disk.path,
                        format=disk.format,
                        owner=owner,
                        qemu=qemu,
                        storage=users[kind_of(below[-1], self.kinds).name],
                        guest_slot=guest.slot if guest else None,
                        stages=below,
                        users=users,
                        base=under,
                    )
                    record.write(self._folder(disk.id), self.kinds)
                if not is_elsewhere:
                    image_file.refuse_if_open(disk.path)
                size = _most_image(disk)
                self._start(record, deks, size=size, base=base, is_elsewhere=is_elsewhere)
            except BaseException as exc:
                self._stop(disk.id, self.record(disk.id))
                if isinstance(exc, OSError):
                    raise StageError(f"cannot serve disk {disk.name!r}: {exc}") from exc
                raise

    def restart(self, disk_id: UUID, deks: Mapping[str, Dek]) -> None:
        """Start a disk's stage processes again under a running guest, if a process has died.

        :raise StageError: When unflushed writes may be lost: the guest would read older data.
        :raise VirtSseError: By meaning, when a process does not start.
        """
        with self._locks.hold(disk_id, wait=True):
            record = self.record(disk_id)
            if record is None or not self.dead(record):
                return
            if not self.may_restart(record):
                raise StageError(LOST_WRITES)
            self._end_processes(disk_id, record)
            if hand_over := self.hand_over(record):
                hand_over.forget()
            record = dataclasses.replace(record, gated=True)
            try:
                record.write(self._folder(disk_id), self.kinds)
                self._start(record, deks, size=0)
            except OSError as exc:
                raise StageError(f"cannot serve disk {disk_id}: {exc}") from exc

    def stop(self, disk_id: UUID, *, domain_id: UUID | None = None, spared_seconds: float = 0) -> bool:
        """End a disk's stage processes and remove their files. Does nothing for a disk without any.

        :param domain_id: do nothing if a different domain has the disk by now.
        :param spared_seconds: do nothing if the processes were started within this time.
        :return: whether no process is left.
        :raise StageError: When a process cannot be ended from here, or the disk's record is damaged.
        """
        with self._locks.hold(disk_id, wait=True):
            record = self.record(disk_id)
            if record is not None:
                is_young = spared_seconds > 0 and age(self._folder(disk_id)) < spared_seconds
                if is_young or domain_id not in (None, record.domain_id):
                    return False
            self._stop(disk_id, record)
            return True

    def stop_domain(self, domain_id: UUID) -> None:
        """End the stage processes of all disks of a domain.

        :raise StageError: When some cannot be ended from here; the rest are ended.
        """
        failed: VirtSseError | None = None
        for record in self.records():
            if record.domain_id == domain_id:
                try:
                    self.stop(record.disk_id, domain_id=domain_id)
                except VirtSseError as exc:
                    failed = exc
                except OSError as exc:
                    failed = StageError(f"cannot end the processes of disk {record.disk_id}: {exc}")
        if failed:
            raise failed

    def stop_damaged(self, domain: str, disk_ids: Collection[UUID]) -> None:
        """End the stage processes of an ended domain's disks whose records are damaged; each is logged.

        The gate tells the domain of the processes. Without a gate, the ended domain's definition does.

        :param domain: name of the ended domain.
        :param disk_ids: the disks in its definition.
        :raise StageError: When some cannot be ended from here; the rest are ended.
        """
        failed: VirtSseError | None = None
        for folder in self._folders():
            try:
                disk_id = UUID(folder.name)
                with self._locks.hold(disk_id, wait=True):
                    reason = self._damage(disk_id)
                    if reason and self._served(folder, domain, is_defined=disk_id in disk_ids):
                        self._return_images(disk_id)
                        self._stop(disk_id, None)
                        _log.warning("ended the processes of disk %s, domain %s: %s", disk_id, domain, reason)
            except ValueError:  # no folder of ours
                continue
            except VirtSseError as exc:
                failed = exc
            except OSError as exc:
                failed = StageError(f"cannot end the processes in {folder}: {exc}")
        if failed:
            raise failed

    def _served(self, folder: Path, domain: str, *, is_defined: bool) -> bool:
        """Whether the processes in *folder* serve a domain, as far as can be told without their record."""
        admits = admitted_by(folder)
        return is_defined if admits is None else admits == self._config.qemu_pid_file(domain)

    def _return_images(self, disk_id: UUID) -> None:
        """Return the images that the disk's processes own to root: only the record has the owner before."""
        for kind in self.kinds:
            if pid := LockedProcess(self._folder(disk_id) / kind.name).pid():
                return_images_of(pid)

    def grow(self, disk: Disk, size: int, *, reconnects: bool) -> None:
        """Grow the volumes below the guest's QEMU, while a guest uses the disk, for *size* usable bytes.

        :param reconnects: whether the guest's QEMU connects again after a disconnect.
        :raise StageError: When a stage process cannot grow, or QEMU would have to connect again and does not.
        """
        with self._locks.hold(disk.id, wait=True):
            record = self.record(disk.id)
            if record is None:
                return
            growable = []
            for each in self.processes(record):
                if (volumes := each.growable()) is None:
                    raise StageError(
                        f"disk {disk.name!r} has a {each.title}, which does not grow", hint=each.growth_hint
                    )
                growable.append((volumes, each))
            for volumes, each in reversed(growable):
                innermost = disk.deks[0].slot
                sizes = [size if slot == innermost else _room(disk, size) for slot in each.slots]
                if all(wanted <= present for wanted, present in zip(sizes, volumes.sizes(), strict=True)):
                    continue
                if not reconnects:
                    raise StageError(
                        f"the volume that holds disk {disk.name!r} cannot grow under a running guest",
                        hint="stop the domain first; with libvirt 9.5 or newer, QEMU can connect again",
                    )
                self._restart_gate(record)  # QEMU is about to connect again
                volumes.grow(sizes, each.place.export)

    def _owner(self, path: Path) -> User:
        """The owner of an image, before a stage process gets the image."""
        with image_file.opened(path) as image:
            status = os.fstat(image)
        is_left_over = status.st_uid in self._config.storage_uids  # by a host that lost power
        return ROOT if is_left_over else User(status.st_uid, status.st_gid)

    def _recorded(self, base: BaseImage) -> RecordedBase:
        with self._locks.hold(base.disk_id, wait=True):  # else another disk's process may have the image
            return RecordedBase(base.disk_id, base.path, self._owner(base.path))

    def _choose_users(self, disk_id: UUID, stages: Sequence[Stage], qemu: User) -> dict[str, User]:
        """A user for each process, by the name of its kind; to be recorded under the same lock.

        :raise VirtSseError: By meaning, when there is none.
        """
        names = [kind.name for kind, _ in by_process(stages, self.kinds)]
        if self._config.storage_user is not None:
            return dict.fromkeys(names, storage_user(self._config.storage_user))
        taken = {qemu.uid}.union(*(record.user_ids for record in self.records()))
        return own_users(self._config.storage_uids, disk_id, names, taken)

    def _start(
        self,
        record: StageRecord,
        deks: Mapping[str, Dek],
        *,
        size: int,
        base: BaseImage | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        with contextlib.ExitStack() as opened:
            image = opened.enter_context(image_file.opened(record.image, os.O_RDWR))
            if not is_elsewhere:
                opened.enter_context(image_file.sole_opener(record.image, image))
            opened.enter_context(lent_base(record, self._locks))
            sockets.make_folders(self._sockets(record.disk_id), record.qemu, record.storage)
            processes = self.processes(record)
            hand_over = self.hand_over(record) if is_elsewhere else None
            if is_elsewhere and hand_over is None:
                raise StageError("a disk with a host cache cannot be handed over by another host")
            image_file.luks_area(image, record.format)  # never give away a file without our LUKS header
            if not processes[-1].is_qemu and record.format is DiskFormat.QCOW2:
                outer = qcow2.most_room(image_file.usable_size(image, record.format))
                _extend(image, max(size, outer))  # the store may not know a size set by others
            os.fchown(image, record.storage.uid, record.storage.gid)
            try:
                for each in reversed(processes):
                    needs_lock = each is processes[-1] and not each.is_qemu
                    gate = self.gate(record) if each is processes[0] else None
                    own = [deks[slot] for slot in each.slots]
                    locked = image if needs_lock else None
                    start_process(each, record.image, own, locked, gate, base, hand_over)
                    if each.is_qemu and each is processes[-1]:  # the process keeps the image open
                        give_back(image, record.storage, record.owner)
            except BaseException:
                give_back(image, record.storage, record.owner)
                raise

    def _stop(self, disk_id: UUID, record: StageRecord | None) -> None:
        self._end_processes(disk_id, record)
        if record:
            take_back_base(record, self._locks)
            with contextlib.suppress(VirtSseError), image_file.opened(record.image) as image:
                give_back(image, record.storage, record.owner)
        # The cache's user may have put links there: rmtree follows none.
        shutil.rmtree(self._config.cache_directory / str(disk_id), ignore_errors=True)
        _remove_tree(self._sockets(disk_id))
        _remove_tree(self._folder(disk_id))

    def _end_processes(self, disk_id: UUID, record: StageRecord | None) -> None:
        """End the processes of all kinds, recorded or not; guest first, in the direction of writes.

        A process with a client, the next process towards the guest, would end by SIGKILL only.
        """
        LockedProcess(self._folder(disk_id) / HAND_OVER).stop()
        processes = self.processes(record) if record else []
        hand_over = self.hand_over(record) if record else None
        is_closed = hand_over is not None and hand_over.has_image_closed
        kinds = (kind.name for kind in self.kinds)
        for name in dict.fromkeys((GATE, *(each.name for each in processes), *kinds)):
            process = LockedProcess(self._folder(disk_id) / name)
            process.stop(patience=0 if is_closed else PATIENCE)  # a daemon would wait for held requests

    def _restart_gate(self, record: StageRecord) -> None:
        gate = self.gate(record)
        if gate is None or gate.process.pid() is not None:
            return
        try:
            gate.start(self.processes(record)[0].process)
        except OSError as exc:
            raise StageError(f"cannot start the gate of disk {record.disk_id}: {exc}") from exc


def _room(disk: Disk, size: int) -> int:
    """Minimum bytes in the volume around the disk's own volume; exact for raw, or QEMU refuses the volume."""
    if disk.format is DiskFormat.QCOW2:
        return qcow2.most_room(size)
    return header_length(disk.deks[0].cipher) + size


def _most_image(disk: Disk) -> int:
    """Largest size in bytes of a disk's image of nested qcow2 volumes."""
    return functools.reduce(lambda size, _: qcow2.most_room(size), disk.deks, disk.size)


def _extend(image: int, size: int) -> None:
    """Extend the sparse file to *size*: an NBD export does not grow, but a qcow2 image in the export does."""
    if os.fstat(image).st_size < size:
        os.ftruncate(image, size)


def _remove_tree(folder: Path) -> None:
    """Remove *folder*: at most two levels of files, sockets and folders."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            for inner in path.iterdir():
                inner.unlink(missing_ok=True)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    folder.rmdir()
