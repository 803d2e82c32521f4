"""Watches the folders of images: disks without an image, and backups in plaintext beside an image."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.snapshot_worker import SingleWorker
from virt_sse.backend import Backend
from virt_sse.disks.missing_images import missing_images
from virt_sse.errors import ImageError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk
from virt_sse.qemu import image_file

_log = logging.getLogger(__name__)

_File = tuple[Path, int, int]
"""A file: path, inode, time of the last change."""


class ImageWatch(SingleWorker):
    """Looks at the folders of all images, in a thread of its own; opens files beside images only.

    :param seconds: interval.
    """

    def __init__(self, backend: Backend, metrics: Metrics, seconds: float) -> None:
        super().__init__("image")
        self._host = backend.host
        self._metrics = metrics
        self._seconds = seconds
        self._not_before = 0.0
        self._missing: set[UUID] = set()
        self._plain: dict[_File, Disk] = {}
        self._encrypted: set[_File] = set()

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Look, once in each interval."""
        if time.monotonic() >= self._not_before and snapshot.number:
            self._not_before = time.monotonic() + self._seconds
            self.submit(snapshot.number, self._look)

    def soon(self) -> None:
        """Look at the next snapshot."""
        self._not_before = 0.0

    def _look(self) -> None:
        disks = self._host.store.all()
        self._host.image_paths.replace(lambda: [disk.path for disk in self._host.store.all()])
        self._report_missing(disks)
        self._report_plain(disks)

    def _report_missing(self, disks: Sequence[Disk]) -> None:
        missing = missing_images(disks, self._host.config.image_states, None)
        for disk in disks:
            details = {"disk": disk.name, "path": str(disk.path)}
            if disk.id in missing - self._missing:
                _log.warning("image-missing", extra=fields(details))
            elif disk.id in self._missing - missing:
                _log.info("image-back", extra=fields(details))
        self._missing = missing
        self._metrics.missing_images.set(len(missing))

    def _report_plain(self, disks: Sequence[Disk]) -> None:
        found = {}
        seen = set()
        for disk, file in _beside(disks):
            seen.add(file)
            if file in self._encrypted:
                continue
            if file in self._plain or _is_plain(file[0], disk.size):
                found[file] = disk
            else:
                self._encrypted.add(file)
        self._encrypted &= seen
        for file, disk in found.items():
            if file not in self._plain:
                details = {"disk": disk.name, "place": str(file[0])}
                _log.warning("plaintext-beside", extra=fields(details))
        self._plain = found
        self._metrics.plaintext_beside.set(len(found))


def _beside(disks: Sequence[Disk]) -> Iterator[tuple[Disk, _File]]:
    """Files named as an image with a suffix, e.g. by libvirt's backups; without the images of disks."""
    own = {disk.path.name for disk in disks}
    by_folder: dict[Path, dict[str, Disk]] = defaultdict(dict)
    for disk in disks:
        if disk.kind is not DiskKind.DISK:
            continue  # no domain writes beside a copy
        by_folder[disk.path.parent][disk.path.name] = disk
    for folder, images in by_folder.items():
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError:
            continue
        for name in names:
            stem = name.rpartition(".")[0]
            if name in own or stem not in images:
                continue
            try:
                status = os.lstat(folder / name)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield images[stem], (folder / name, status.st_ino, status.st_mtime_ns)


def _is_plain(path: Path, size: int) -> bool:
    """Whether a file is like an unencrypted copy of a disk of *size* bytes."""
    try:
        with image_file.opened(path) as descriptor:
            return image_file.is_plain_copy(descriptor, size)
    except ImageError:
        return False
