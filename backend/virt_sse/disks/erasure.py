"""The end of a disk: its keyslots are overwritten, its wrapped DEKs forgotten, its image removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from virt_sse.disks import backup_manifest
from virt_sse.disks.certificates import DeletionCertificates
from virt_sse.disks.stored_images import usable
from virt_sse.errors import DiskInUseError, ImageError
from virt_sse.keys.access import PURGE
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk, DiskState, state_error
from virt_sse.model.operations import DeleteDisk
from virt_sse.qemu import envelope_slots, image_file
from virt_sse.system.block_devices import is_device
from virt_sse.system.files import sync_folder
from virt_sse.system.rbd_names import is_rbd


class Erasure:
    """Erases disks and copies for good, without asking libvirt."""

    def __init__(self, host: Host, certificates: DeletionCertificates) -> None:
        self._host = host
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._freshness = host.freshness
        self._certificates = certificates

    def erase(
        self, disk: Disk, *, dry_run: bool = False, certified: bool = False, after: Collection[Disk] = ()
    ) -> None:
        """Crypto-erase a disk: wipe keyslots, forget wrapped DEKs, remove the image.

        A disk without an image is removed from the store.

        :param dry_run: check only.
        :param certified: issue a certificate, kept in the store.
        :param after: what is erased before, and may need the disk until then.
        :raise DiskStateError: When the stored state differs from that of *disk*, or is not at rest.
        :raise DiskInUseError: When a QEMU process has the image open, or incremental copies or linked clones
            need it.
        :raise ImageError: When the file at the disk's path is not its image.
        :raise AuditError: When the erasure cannot be recorded; nothing has been done then.
        """
        state = disk.state if disk.state.is_at_rest else DiskState.READY
        with usable(self._host, disk, state) as current:
            if current.deleted != disk.deleted:  # recovered, and deleted again
                raise state_error(current)
            self.check(current, after)
            if dry_run:
                return
            self._keys.note(PURGE, current, f"image {current.path}")
            if certified:
                self._certificates.request(current)
            self._store.begin_deletion(current.id)
            self.finish(current)

    def check(self, disk: Disk, after: Collection[Disk] = ()) -> None:
        """Check that a disk may be deleted; the caller holds its lock.

        :param after: as for :meth:`erase`.
        :raise VirtSseError: As :meth:`erase`.
        """
        self._refuse_below(disk, after)
        self._plugins.validate(DeleteDisk(disk))
        if image_file.exists(disk.path):
            if envelope_slots.carried_id(disk.path, disk.format) != disk.id:
                raise ImageError(
                    f"{disk.path} is not the image of disk {disk.name!r} any more, or is damaged",
                    hint="move the file away; a disk without an image is removed from the store",
                )
            image_file.refuse_if_open(disk.path)

    def _refuse_below(self, disk: Disk, after: Collection[Disk]) -> None:
        """Refuse the erasure of a copy that others than *after* are based on."""
        gone = {each.id for each in after}
        if above := [each for each in self.based_on(disk) if each.id not in gone]:
            names = ", ".join(copy.name for copy in above)
            raise DiskInUseError(
                f"{disk.kind.title} {disk.name!r} is needed by what is based on it: {names}",
                hint="delete these first, the last in the list before the others",
            )

    def based_on(self, disk: Disk) -> list[Disk]:
        """All copies and linked clones that cannot be read without *disk*, each after the copy below."""
        found = self._store.based_on(disk.id)
        for copy in found:  # grows: the copies of the next level follow
            found += [each for each in self._store.based_on(copy.id) if each not in found]
        return found

    def finish(self, disk: Disk) -> None:
        """Do, or finish, an erasure that the store has noted; the caller holds the disk's lock.

        The image is erased and removed under a name of its own: after a kill, its path may hold
        another file. A block device stays, and has no trace of the disk's keys.

        :raise ImageError: When the image cannot be erased or removed.
        :raise CephError: When an RBD image cannot.
        """
        is_erased = not disk.deks  # by a killed command: DEKs are dropped after the erasure
        if is_rbd(disk.path):
            is_erased = self._erase_in_ceph(disk) or is_erased
        else:
            is_erased = self._erase_file(disk) or is_erased
        self._freshness.note_deleted(disk)
        self._certificates.issue(disk, "erased" if is_erased else "missing")
        self._store.remove(disk.id)

    def _erase_in_ceph(self, disk: Disk) -> bool:
        """Erase and remove an RBD image; whether there was one."""
        doomed = _doomed(disk)
        if envelope_slots.carried_id(disk.path, disk.format) == disk.id:
            image_file.publish(disk.path, doomed)
        if not image_file.exists(doomed):
            return False
        image_file.erase(doomed, disk.format)
        self._store.drop_deks(disk.id)
        image_file.remove(doomed)
        return True

    def _erase_file(self, disk: Disk) -> bool:
        """Erase and remove an image that is a file; erase a block device. Whether there was an image."""
        doomed, is_erased = _doomed(disk), False
        in_place = is_device(disk.path)  # erased in place, the envelope last
        try:
            with contextlib.ExitStack() as stack:
                image = _open_own(stack, disk, disk.path)
                if image is not None and not in_place:
                    disk.path.rename(doomed)
                    sync_folder(doomed.parent)
                elif image is None and not in_place:
                    image = _open_own(stack, disk, doomed)
                    if image is None:
                        image = _open_leftover(stack, doomed)
                if image is not None:  # by descriptor: the name may meanwhile be a link made by another user
                    image_file.erase(Path(f"/proc/self/fd/{image}"), disk.format)
                    is_erased = True
            backup_manifest.remove(disk)
            if in_place:
                self._store.drop_deks(disk.id)
            elif os.path.lexists(doomed):
                self._store.drop_deks(disk.id)
                doomed.unlink()
                sync_folder(doomed.parent)
        except OSError as exc:
            raise ImageError(f"cannot remove {disk.path}: {exc.strerror}") from exc
        return is_erased


def _doomed(disk: Disk) -> Path:
    """The path of an image during its erasure."""
    return disk.path.with_name(f".{disk.id}.erased")


def _open_own(stack: contextlib.ExitStack, disk: Disk, path: Path) -> int | None:
    """Open the file at *path*; ``None`` unless the file carries the disk's envelope."""
    try:
        descriptor = stack.enter_context(image_file.opened(path))
    except ImageError:
        return None
    return descriptor if envelope_slots.id_in(descriptor, disk.format) == disk.id else None


def _open_leftover(stack: contextlib.ExitStack, doomed: Path) -> int | None:
    """Open an image whose erasure was interrupted and may have removed the envelope.

    ``None`` for a missing file, and for a symbolic link: any user who may write the folder can point a link
    to any file of the host.

    :raise ImageError: When the file cannot be opened, or has hard links, for the same reason.
    """
    if doomed.is_symlink() or not os.path.lexists(doomed):
        return None
    descriptor = stack.enter_context(image_file.opened(doomed, os.O_RDONLY | os.O_NOFOLLOW))
    if os.fstat(descriptor).st_nlink != 1:
        raise ImageError(
            f"{doomed} has further names and may be another file",
            hint="remove the file, or its other names, to finish the deletion",
        )
    return descriptor
