"""Stored disks compared with their images, without a key. Imports little: ``disk show`` needs no more."""

from __future__ import annotations

import contextlib
import dataclasses

from virt_sse.errors import ImageError
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk, DiskState
from virt_sse.qemu import envelope_slots, img


def with_real_size(host: Host, disk: Disk) -> Disk:
    """The disk with the real size of its image, after an interrupted resize or a resize by other tools.

    Another size is stored. Missing or damaged images change nothing, nor do images with several layers: their
    size is encrypted.
    """
    if disk.state is not DiskState.READY or len(disk.deks) > 1:
        return disk
    with contextlib.suppress(ImageError), img.opened(disk.path) as descriptor:
        size = img.usable_size(descriptor, disk.format)
        if size != disk.size:
            host.store.set_size(disk.id, size)
            return dataclasses.replace(disk, size=size)
    return disk


def image_state(disk: Disk) -> str:
    """The state of the disk's image by its envelope: ``present``, or an error message."""
    try:
        with img.opened(disk.path) as descriptor:
            if envelope_slots.read(descriptor, disk.format).disk_id != disk.id:
                return f"{disk.path} is the image of another disk"
    except ImageError as exc:
        return str(exc)
    return "present"
