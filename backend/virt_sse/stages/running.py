"""Starts, watches and ends the stages of disks on this host."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, StageError, VirtSseError
from virt_sse.libvirt.users import ROOT, User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import GuestNode, HostCache, HostCaching, LayerPlan, StorageNode
from virt_sse.qemu import img, qcow2
from virt_sse.qemu.formatting import header_length
from virt_sse.qemu.storage_daemon import StorageDaemon
from virt_sse.qemu.storage_daemon import arguments as daemon_arguments
from virt_sse.stages import cache
from virt_sse.stages.process import Command, Process
from virt_sse.stages.record import StageRecord
from virt_sse.stages.users import storage_user
from virt_sse.system.files import private_folder
from virt_sse.system.locks import DiskLocks

_BACKLOG = 8
_LONGEST_SOCKET_PATH = 107
"""Linux, unix(7): ``sun_path`` less its zero byte."""
_GREETING, _GREETING_SECONDS = b"NBDMAGIC", 10.0
_GUEST_SOCKET = "guest/nbd"
_INNER_SOCKET = "stages/nbd"
"""Between a cache and a storage daemon."""


class Stages:
    """All of a host's; several processes may use one at the same time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._locks = DiskLocks(config.stage_directory.parent / "stages.lock")

    def guest_socket(self, disk_id: UUID) -> Path:
        """Where a guest's QEMU finds the disk."""
        return self._config.socket_directory / str(disk_id) / _GUEST_SOCKET

    def records(self) -> list[StageRecord]:
        """What there is, running or not."""
        try:
            folders = sorted(self._config.stage_directory.iterdir())
        except FileNotFoundError:
            return []
        return [record for folder in folders if (record := StageRecord.read(folder))]

    def record(self, disk_id: UUID) -> StageRecord | None:
        """What there is of one disk."""
        return StageRecord.read(self._folder(disk_id))

    def dead(self, record: StageRecord) -> list[str]:
        """The names of the processes of *record* that do not run."""
        names = ["cache"] if record.has_cache else []
        if record.storage_slot is not None:
            names.append("storage")
        return [name for name in names if self._process(record.disk_id, name).pid() is None]

    def storage_daemon(self, disk_id: UUID) -> StorageDaemon:
        """The storage daemon of a disk that has one."""
        return StorageDaemon(self._folder(disk_id) / "qmp")

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
    ) -> None:
        """Start the stages of *plan* below the guest's, anew if any run; nothing when there are none.

        :param deks: by slot.
        :param qemu: whom the domain's QEMU runs as.
        :param replacing: another domain, which does not run, and whose stages may be ended.
        :raise DiskInUseError: When there are stages for any other; or a QEMU process has the image open.
        :raise StageError: When one does not start; none of them runs then.
        :raise VirtSseError: By meaning, likewise.
        """
        caches = [stage.caching for stage in plan.stages if isinstance(stage, HostCache)]
        slots = [stage.slot for stage in plan.stages if isinstance(stage, StorageNode)]
        (guest,) = (stage.slot for stage in plan.stages if isinstance(stage, GuestNode))
        if not caches and not slots:
            return
        with self._locks.hold(disk.id, wait=True):
            before = self.record(disk.id)
            if before and before.domain_id not in (domain_id, replacing):
                raise DiskInUseError(f"disk {disk.name!r} is in use by domain {before.domain!r}")
            self._stop(disk.id)
            with img.opened(disk.path) as image:
                status = os.fstat(image)
            record = StageRecord(
                disk_id=disk.id,
                domain_id=domain_id,
                domain=domain,
                image=disk.path,
                format=disk.format,
                owner=User(status.st_uid, status.st_gid),
                qemu=qemu,
                storage=storage_user(self._config.storage_user, qemu),
                caching=caches[0] if caches else HostCaching.NONE,
                guest_slot=guest,
                storage_slot=slots[0] if slots else None,
            )
            try:
                record.write(self._folder(disk.id))
                self._start(record, deks, size=disk.size)
            except BaseException as exc:
                self._stop(disk.id)
                if isinstance(exc, OSError):
                    raise StageError(f"cannot serve disk {disk.name!r}: {exc}") from exc
                raise

    def restart(self, disk_id: UUID, deks: Mapping[str, Dek]) -> None:
        """Start what has died of a disk's stages again, below a guest that runs on.

        :raise StageError: When that might give the guest older data than it was told is written.
        :raise VirtSseError: By meaning, when it does not start.
        """
        with self._locks.hold(disk_id, wait=True):
            record = self.record(disk_id)
            if record is None or not self.dead(record):
                return
            if not record.keeps_all:
                raise StageError("what it had not flushed is lost: the domain must be stopped and started")
            for name in ("cache", "storage"):
                self._process(disk_id, name).stop()
            try:
                self._start(record, deks, size=0)
            except OSError as exc:
                raise StageError(f"cannot serve disk {disk_id}: {exc}") from exc

    def stop(self, disk_id: UUID, *, domain_id: UUID | None = None) -> None:
        """End a disk's stages, and leave nothing of them. Nothing when there are none.

        :param domain_id: not if they are another domain's by now.
        :raise StageError: When they cannot be ended from here.
        """
        with self._locks.hold(disk_id, wait=True):
            record = self.record(disk_id) if domain_id else None
            if record is None or record.domain_id == domain_id:
                self._stop(disk_id)

    def stop_domain(self, domain_id: UUID) -> None:
        """End the stages of all disks of a domain.

        :raise StageError: When some cannot be ended from here; the others are.
        """
        failed: VirtSseError | None = None
        for record in self.records():
            if record.domain_id == domain_id:
                try:
                    self.stop(record.disk_id, domain_id=domain_id)
                except VirtSseError as exc:
                    failed = exc
        if failed:
            raise failed

    def grow(self, disk: Disk, size: int, *, reconnects: bool) -> None:
        """Make room for a disk of *size* usable bytes in the volume that holds it, while a guest uses it.

        :param reconnects: whether the guest's QEMU connects again when it is cut off.
        :raise StageError: When a host cache is in between, which does not grow; or when QEMU would have to
            connect again and does not.
        """
        with self._locks.hold(disk.id, wait=True):
            record = self.record(disk.id)
            if record is None:
                return
            if record.has_cache:
                raise StageError(
                    f"disk {disk.name!r} has a host cache, which does not grow",
                    hint="stop the domain, or set the disk's caching to None",
                )
            daemon = self.storage_daemon(disk.id)
            if (room := _room(disk, size)) <= daemon.size():
                return
            if not reconnects:
                raise StageError(
                    f"the volume that holds disk {disk.name!r} cannot grow under a running guest",
                    hint="stop the domain first; libvirt lets QEMU connect again to a grown one from 9.5 on",
                )
            daemon.grow(room, disk.id)

    def _start(self, record: StageRecord, deks: Mapping[str, Dek], *, size: int) -> None:
        img.refuse_if_open(record.image)  # QEMU's driver for raw LUKS would not
        _make_folders(self._config.socket_directory / str(record.disk_id), record)
        with img.opened(record.image, os.O_RDWR) as image:
            img.luks_area(image, record.format)  # whatever lies there by now, no other file is given away
            os.fchown(image, record.storage.uid, record.storage.gid)
            if record.storage_slot is None and record.format is DiskFormat.QCOW2:
                _extend(image, size)
            guest = self.guest_socket(record.disk_id)
            if record.storage_slot is not None:
                inner = guest.parent.parent / _INNER_SOCKET
                path, user = (inner, record.storage) if record.has_cache else (guest, record.qemu)
                self._start_storage(record, deks[record.storage_slot], path, user)
                source = cache.over_export(inner, record.disk_id)
            else:
                source = cache.over_image(record.image)
            if record.has_cache:
                self._start_cache(record, source, guest, image)

    def _start_storage(self, record: StageRecord, dek: Dek, path: Path, user: User) -> None:
        process = self._process(record.disk_id, "storage")
        daemon = self.storage_daemon(record.disk_id)
        for is_last in (False, True):
            with _listening(daemon.monitor, ROOT) as monitor, _listening(path, user) as listening:
                command = Command(daemon_arguments(monitor, listening), [monitor, listening])
                process.start(command, record.storage)
            try:
                daemon.open_volume(record.image, record.format, dek, record.disk_id)
                return
            except VirtSseError as exc:
                log, has_ended = process.log, process.pid() is None
                if has_ended and not log and not is_last:
                    continue  # on a machine under load it was seen to end at once, and without a word
                said = f" ({log})" if log else " (it has ended)" if has_ended else ""
                raise StageError(f"the storage daemon cannot serve {record.image}: {exc}{said}") from exc

    def _start_cache(self, record: StageRecord, source: list[str], path: Path, image: int) -> None:
        folder = private_folder(self._config.cache_directory)
        os.chown(folder, record.storage.uid, record.storage.gid)
        with _listening(path, record.qemu) as listening:
            command = Command(
                cache.arguments(record.caching, source),
                listening=listening,
                environment={"TMPDIR": str(folder)},
            )
            lock = image if record.storage_slot is None else None
            process = self._process(record.disk_id, "cache")
            process.start(command, record.storage, image=lock)
        _await_greeting(path, process)

    def _stop(self, disk_id: UUID) -> None:
        for name in ("cache", "storage"):  # the one that writes into the other first
            self._process(disk_id, name).stop()
        record = self.record(disk_id)
        if record:
            with contextlib.suppress(VirtSseError), img.opened(record.image) as image:
                if os.fstat(image).st_uid == record.storage.uid:
                    os.fchown(image, record.owner.uid, record.owner.gid)
        _remove_tree(self._config.socket_directory / str(disk_id))
        _remove_tree(self._folder(disk_id))

    def _folder(self, disk_id: UUID) -> Path:
        return self._config.stage_directory / str(disk_id)

    def _process(self, disk_id: UUID, name: str) -> Process:
        return Process(self._folder(disk_id) / name)


def _room(disk: Disk, size: int) -> int:
    """What the volume that the disk's own lies in must hold; of a raw one to the byte, or QEMU refuses it."""
    if disk.format is DiskFormat.QCOW2:
        return qcow2.most_room(size)
    return header_length(disk.deks[0].cipher) + size


def _extend(image: int, size: int) -> None:
    """Make the file as large as its qcow2 can become, as what NBD serves does not grow. Takes no room."""
    if os.fstat(image).st_size < qcow2.most_room(size):
        os.ftruncate(image, qcow2.most_room(size))


def _make_folders(folder: Path, record: StageRecord) -> None:
    """Where sockets lie. Those who use them may pass through, and put nothing there: root works in them."""
    for path, group, mode in (
        (folder.parent, ROOT.gid, 0o711),
        (folder, ROOT.gid, 0o711),
        (folder / "guest", record.qemu.gid, 0o710),
        (folder / "stages", record.storage.gid, 0o710),
    ):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chown(path, ROOT.uid, group)
        path.chmod(mode)


@contextlib.contextmanager
def _listening(path: Path, user: User) -> Iterator[int]:
    """The descriptor of a socket that listens at *path*, made anew; *user* and root may connect.

    :raise OSError: When it cannot be made.
    """
    if (excess := len(os.fsencode(path)) - _LONGEST_SOCKET_PATH) > 0:
        raise StageError(f"{path} is too long for a socket, by {excess} bytes")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        os.chown(path, user.uid, user.gid)
        listener.listen(_BACKLOG)
        yield listener.fileno()


def _await_greeting(path: Path, process: Process) -> None:
    """Go on when an NBD server greets at *path* (NBD protocol, "newstyle negotiation").

    :raise StageError: When *process*, whose socket it is, ends before, or does not.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(_GREETING_SECONDS)
            client.connect(str(path))
            if client.recv(len(_GREETING), socket.MSG_WAITALL) == _GREETING:
                return
    except OSError:
        pass
    raise StageError(f"the host cache does not start: {process.log or 'it says nothing'}")


def _remove_tree(folder: Path) -> None:
    """Remove what is ours of *folder*: two levels of files, sockets and folders."""
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
