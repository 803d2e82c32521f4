"""Re-encryption: new DEKs and a new volume key for a disk, whether or not a guest runs on the disk."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from virt_sse.disks.creation import Successor
from virt_sse.disks.inspector import Inspector
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import usable
from virt_sse.domains.start import DomainStart
from virt_sse.errors import DiskInUseError, DiskStateError, ImageError, VirtSseError
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_users, domains
from virt_sse.libvirt.connection import connected
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, NewDisk, check_kind, check_path
from virt_sse.model.layers import HostCaching
from virt_sse.model.operations import DeleteDisk
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.qemu import conversion, image_file, unlocking
from virt_sse.replacement.offline import Bars, copy_offline, no_bars
from virt_sse.replacement.online import OnlineCopy
from virt_sse.replacement.settlement import Settlement
from virt_sse.system.block_devices import is_device
from virt_sse.system.progress import Progress
from virt_sse.system.rbd_names import is_rbd

_CANCELLING_SECONDS = 120.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reencryption:
    """How to re-encrypt a disk; ``None`` keeps the disk's value.

    :ivar encryption_set: name or id; the set decides the number of layers.
    :ivar path: path of the new image; default: the path of the old image, or under a running guest a new name
        in the same folder.
    :ivar max_rate: upper bound in bytes/s.
    """

    cipher: Cipher | None = None
    infrastructure_cipher: Cipher | None = None
    encryption_set: str | None = None
    format: DiskFormat | None = None
    path: Path | None = None
    max_rate: int | None = None


@dataclass(frozen=True, slots=True)
class Reencrypted:
    """The outcome of a copy.

    :ivar paused_seconds: how long the guest was paused; ``None`` without a running guest.
    """

    disk: Disk
    paused_seconds: float | None


class ReencryptionService:
    """Re-encrypts disks."""

    def __init__(
        self, host: Host, disks: Disks, start: DomainStart, inspector: Inspector, settlement: Settlement
    ) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._plugins = host.plugins
        self._locks = host.locks
        self._disks = disks
        self._start = start
        self._inspector = inspector
        self._settlement = settlement

    def reencrypt(self, name: str, change: Reencryption, bars: Bars) -> Reencrypted:
        """Give a disk new DEKs, and so a new volume key, also while a domain uses the disk.

        :param name: name or id.
        :raise DiskInUseError: When another command is at work on the disk.
        :raise DiskStateError: When the disk is not ready, or has overlays, a backup or another block job.
        :raise VirtSseError: By meaning; the disk is then as before.
        """
        with usable(self._host, self._disk(name)) as disk:
            copy = self._begin(disk, change, is_detached=False)
            return self._run(copy, bars, None)

    def reencrypt_all(
        self, disks: Sequence[Disk], *, jobs: int, max_rate: int | None, progress: Progress
    ) -> dict[str, VirtSseError]:
        """Re-encrypt several disks, *jobs* at a time; a failure does not stop the others.

        :param max_rate: upper bound in bytes/s for each disk.
        :return: the failures by disk name.
        """
        failed: dict[str, VirtSseError] = {}
        change = Reencryption(max_rate=max_rate)
        with ThreadPoolExecutor(jobs, "reencrypt") as pool:
            running = {pool.submit(self.reencrypt, disk.name, change, no_bars): disk for disk in disks}
            for number, done in enumerate(as_completed(running), start=1):
                try:
                    done.result()
                except VirtSseError as exc:
                    failed[running[done].name] = exc
                progress(number / len(running))
        return failed

    def start_detached(self, name: str, change: Reencryption) -> Disk:
        """As :meth:`reencrypt`, for the agent to do the copying.

        :return: the disk.
        """
        with usable(self._host, self._disk(name)) as disk:
            self._begin(disk, change, is_detached=True)
            return disk

    def _disk(self, name: str) -> Disk:
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        return disk

    def cancel(self, name: str) -> Disk:
        """Undo the re-encryption of a disk that another process does, and wait until done.

        :raise DiskStateError: When the disk is not being re-encrypted, or the new disk has taken over.
        """
        disk = self._store.get(name)
        copy = self._store.replacements.find(disk.id)
        if copy is None or copy.state is ReplacementState.DONE:
            raise DiskStateError(f"disk {disk.name!r} is not being re-encrypted")
        self._store.replacements.cancel(copy)
        deadline = time.monotonic() + _CANCELLING_SECONDS
        while self._store.replacements.find(copy.disk_id):
            with contextlib.suppress(DiskInUseError), self._locks.hold(copy.lock_id):
                self._settlement.settle(copy)
                continue
            if time.monotonic() > deadline:
                raise DiskInUseError(f"another process is still at work on disk {disk.name!r}")
            time.sleep(_POLL_SECONDS)
        if copy.source_id is None:
            return disk
        for source in self._store.with_ids([copy.source_id]):
            if source.state is DiskState.READY:
                return source
        raise DiskStateError(f"disk {copy.name!r} was re-encrypted before the copy could be cancelled")

    def continue_detached(self, copy: Replacement, stopping: threading.Event) -> Reencrypted | None:
        """Go on with a copy whose command has ended; for the agent.

        :return: ``None`` if another process is at work on the copy, or the copy was undone.
        :raise VirtSseError: By meaning, when the copy has failed and was undone.
        """
        try:
            with self._locks.hold(copy.lock_id):
                found = self._store.replacements.find(copy.disk_id)
                if found is None:
                    return None
                if found.is_detached and not found.is_cancelled and found.state is ReplacementState.COPYING:
                    return self._run(found, no_bars, stopping)
                self._settlement.settle(found)
                return None
        except DiskInUseError:
            return None

    def _begin(self, disk: Disk, change: Reencryption, *, is_detached: bool) -> Replacement:
        """Record a copy and make the new disk; undone after a failure."""
        disk = self._disks.with_size_within(disk)
        if is_rbd(disk.path) or (change.path and is_rbd(change.path)):
            raise DiskStateError(
                f"disk {disk.name!r} cannot be re-encrypted from or into Ceph",
                hint="'virt-sse disk copy' makes a new disk with new DEKs",
            )
        self._plugins.validate(DeleteDisk(disk))
        domain_id, target = self._running_user(disk)
        copy_id = uuid.uuid4()
        image_format = change.format or disk.format
        moves = is_device(disk.path)
        folder = self._host.config.disk_directory if moves else disk.path.parent
        beside = folder / f"{disk.name}-{copy_id.hex[:8]}.{image_format.value}"
        keeps_path = change.path is None and domain_id is None and image_format is disk.format and not moves
        infrastructure = disk.deks[-1].cipher if len(disk.deks) > 1 else None
        new = NewDisk(
            name=f"{disk.name[:60]}.copy-{copy_id.hex[:8]}",
            size=disk.size,
            format=image_format,
            sku=disk.sku,
            encryption_set=change.encryption_set or (str(disk.set_id) if disk.set_id else None),
            cipher=change.cipher or disk.deks[0].cipher,
            infrastructure_cipher=change.infrastructure_cipher or infrastructure,
            place=check_path(change.path) if change.path else beside,
            source=disk,
        )
        copy = Replacement(
            disk_id=copy_id,
            name=disk.name,
            source_id=disk.id,
            final_path=disk.path if keeps_path else None,
            domain_id=domain_id,
            target=target,
            is_detached=is_detached,
            max_rate=change.max_rate,
        )
        self._store.replacements.begin(copy)
        with self._settlement.undone_after_failure(copy):
            self._disks.create(
                new,
                content=self._inspector.content(disk, disk.name),
                successor=Successor(copy_id, disk.name, disk.guest_serial),
            )
            if disk.caching is not HostCaching.NONE:
                self._store.vms.set_caching(copy_id, disk.caching)
            self._store.replacements.reserve(copy)
        return copy

    def _running_user(self, disk: Disk) -> tuple[uuid.UUID | None, str]:
        """The running domain with the disk, and the disk's name there.

        :raise DiskStateError: When the disk has overlays, a backup or another block job there.
        :raise LibvirtUnavailableError: When libvirt does not answer.
        """
        with connected(self._uri) as connection:
            for domain in disk_users.using(connection, disk.id):
                if not domain.isActive():
                    continue
                backup = domains.running_backup(domain)
                for chain in domains.definition(domain).disk_chains(backup):
                    if chain.disk_id != disk.id:
                        continue
                    if len(chain.links) > 1 or chain.mirror or chain.backup:
                        raise DiskStateError(
                            f"disk {disk.name!r} has an overlay, a backup or a block job in domain "
                            f"{domain.name()!r}"
                        )
                    return uuid.UUID(domain.UUIDString()), chain.target
        image_file.refuse_if_open(disk.path)
        return None, ""

    def _run(self, copy: Replacement, bars: Bars, stopping: threading.Event | None) -> Reencrypted:
        paused = None
        with self._settlement.undone_after_failure(copy):
            if copy.domain_id is not None:
                with bars("re-encrypting") as progress:
                    paused = OnlineCopy(self._host, self._start, copy, stopping).run(progress)
            else:
                self._copy_offline(copy, bars, stopping)
                self._store.replacements.take_over(copy)
        self._settlement.finish_or_leave(copy)
        return Reencrypted(self._store.get(str(copy.disk_id)), paused)

    def _copy_offline(self, copy: Replacement, bars: Bars, stopping: threading.Event | None) -> None:
        source = self._store.get(str(copy.source_id))
        self._host.freshness.check(source)
        image_file.refuse_if_open(source.path)
        before = _identity(source.path)
        deks = self._host.keys.unwrap_all(source)
        headers = unlocking.validate(source.path, source.format, deks[1:])
        self._host.freshness.check_inner(source, headers, always_refuse=True)
        base = unlocked_base(self._host, source)
        content = conversion.CopySource.encrypted(source.path, source.format, deks, base=base)
        copy_offline(self._host, copy, content, bars, stopping)
        if _identity(source.path) != before:
            raise ImageError(f"{source.path} was changed during the copy")


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Properties of a file that change with its content."""
    with image_file.opened(path) as descriptor:
        status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
