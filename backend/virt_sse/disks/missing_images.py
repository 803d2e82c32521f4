"""Disks without an image, found without opening an image. Imports little, for ``disk list``."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from pathlib import Path
from uuid import UUID

from virt_sse.model.disks import Disk, DiskState
from virt_sse.system.rbd_names import is_rbd

MISSING = "missing"
"""The state shown for a ready disk without an image; the store keeps the disk as ready."""

_SECONDS = 2.0


def missing_images(
    disks: Collection[Disk], image_states: Path, seconds: float | None = _SECONDS
) -> set[UUID]:
    """Find ready disks without an image at their paths.

    Only disks whose images were in use on this host are looked for: of a store shared by hosts, each host may
    have images of its own.

    Images in Ceph are not looked for: each takes a connection.

    :param image_states: folder with the last known states of this host's images.
    :param seconds: time limit, because a storage may hang: the disks not looked for in time are left out.
        ``None`` for no limit.
    """
    found: set[UUID] = set()

    def look() -> None:
        for disk in disks:
            if (
                disk.state is DiskState.READY
                and not is_rbd(disk.path)
                and not os.path.lexists(disk.path)
                and (image_states / str(disk.id)).exists()
            ):
                found.add(disk.id)

    if seconds is None:
        look()
        return found
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    return set(found)
