"""Images that belong to the user of a storage process until the process has opened them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from virt_sse.errors import VirtSseError
from virt_sse.libvirt.users import ROOT, User
from virt_sse.qemu import image_file
from virt_sse.stages.record import StageRecord
from virt_sse.stages.storage_daemon import StorageDaemonProcess
from virt_sse.system.locks import DiskLocks


def give_back(image: int, user: User, owner: User) -> None:
    """Return the open image to *owner*, if *user* has it."""
    if os.fstat(image).st_uid == user.uid:
        os.fchown(image, owner.uid, owner.gid)


def return_images_of(pid: int) -> None:
    """Return the images that a process has open, and owns, to root."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):  # the process has ended
        user = folder.stat().st_uid
        for entry in (folder / "fd").iterdir():
            with contextlib.suppress(VirtSseError), image_file.opened(entry) as image:
                status = os.fstat(image)
                if status.st_uid == user and status.st_nlink:
                    image_file.luks_area(image, image_file.probe_format(image))
                    os.fchown(image, ROOT.uid, ROOT.gid)


@contextlib.contextmanager
def lent_base(record: StageRecord, locks: DiskLocks) -> Iterator[None]:
    """Give the image below a linked clone to the storage daemon's user during the block, to be opened.

    Daemons of other clones keep the image open meanwhile, or wait to open it. No daemon can write the image:
    Landlock lets a daemon read it only.

    :raise ImageError: When the image is missing, or has no LUKS header.
    """
    base = record.base
    if base is None:
        yield
        return
    user = record.user(StorageDaemonProcess.name)
    with locks.hold(base.disk_id, wait=True), image_file.opened(base.path) as image:
        image_file.luks_area(image, image_file.probe_format(image))
        os.fchown(image, user.uid, user.gid)
        try:
            yield
        finally:
            give_back(image, user, base.owner)


def take_back_base(record: StageRecord, locks: DiskLocks) -> None:
    """Return the image below a linked clone to its owner, after a start that was killed."""
    base = record.base
    if base is not None:
        with (
            locks.hold(base.disk_id, wait=True),
            contextlib.suppress(VirtSseError),
            image_file.opened(base.path) as image,
        ):
            give_back(image, record.user(StorageDaemonProcess.name), base.owner)
