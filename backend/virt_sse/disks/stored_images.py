"""Stored disks: locked, and compared with their images without a key. Imports little, for ``disk show``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from virt_sse.errors import CephError, ImageError
from virt_sse.keys.freshness import with_images_envelope
from virt_sse.keys.host import Host
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, state_error
from virt_sse.qemu import envelope_slots, image_file


@contextlib.contextmanager
def usable(host: Host, disk: Disk, *states: DiskState) -> Iterator[Disk]:
    """Lock a disk: the disk as stored once the lock is held.

    An authentic envelope in the image that is newer than the store's, written by another host, comes first.

    :param states: the allowed states; default: ready.
    :raise DiskInUseError: When another command holds the lock.
    :raise DiskStateError: When the disk has another state.
    """
    if disk.state is DiskState.COPYING:  # its lock may be held for long
        raise state_error(disk)
    with host.locks.hold(disk.id):
        current = host.store.get(str(disk.id))
        if current.state not in (states or (DiskState.READY,)):
            raise state_error(current)
        yield with_images_envelope(host.freshness, host.opened_store, current)


def with_real_size(host: Host, disk: Disk) -> Disk:
    """The disk with the real size of its image, after an interrupted resize or a resize by other tools.

    Another size is stored. Missing or damaged images change nothing, nor do images with several layers: their
    size is encrypted. The images of copies never change their size.
    """
    if not disk.state.is_at_rest or disk.kind is not DiskKind.DISK or len(disk.deks) > 1:
        return disk
    with contextlib.suppress(ImageError, CephError), image_file.opened(disk.path) as descriptor:
        size = image_file.usable_size(descriptor, disk.format)
        if size != disk.size:
            host.store.set_size(disk.id, size)
            return dataclasses.replace(disk, size=size)
    return disk


def waiting(host: Host, source: Disk) -> Disk | None:
    """The disk of this host that waits for the content of *source*, a disk of a shared store, if any."""
    made = host.opened_store.full().made_of(source.id)
    found = [disk for disk in made if disk.state is DiskState.RECEIVING]
    elsewhere = host.leases.held_elsewhere([disk.id for disk in found])
    return next((disk for disk in found if disk.id not in elsewhere), None)


def image_state(disk: Disk) -> str:
    """The state of the disk's image by its envelope: ``present``, or an error message."""
    try:
        with image_file.opened(disk.path) as descriptor:
            if envelope_slots.read(descriptor, disk.format).disk_id != disk.id:
                return f"{disk.path} is the image of another disk"
    except (ImageError, CephError) as exc:
        return str(exc)
    return "present"
