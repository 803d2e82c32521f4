"""Watches the folders of images: disks without an image, and backups in plaintext beside an image."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.known_images import KnownImages
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.snapshot_worker import SingleWorker
from virt_sse.backend import Backend
from virt_sse.disks.missing_images import missing_images
from virt_sse.errors import ImageError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk
from virt_sse.qemu import image_file
from virt_sse.system.rbd_names import is_rbd

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
        self._missing: dict[UUID, Disk] = {}
        self._plain: dict[_File, Disk] = {}
        self._encrypted: set[_File] = set()
        self._images = KnownImages(backend.host.store, backend.host.image_paths)

    def keep(self, snapshot: InventorySnapshot) -> None:
        """Look, once in each interval."""
        if time.monotonic() >= self._not_before and snapshot.number:
            self._not_before = time.monotonic() + self._seconds
            self.submit(snapshot.number, self._look)

    def soon(self) -> None:
        """Look at the next snapshot."""
        self._not_before = 0.0

    def _look(self) -> None:
        self._images.update()
        self._report_missing()
        self._report_plain()

    def _report_missing(self) -> None:
        suspects = {disk_id for disk_id in self._host.freshness.used_here() if self._is_missing(disk_id)}
        stored = {disk.id: disk for disk in self._host.store.with_ids(suspects | self._missing.keys())}
        self._images.forget(suspects - stored.keys())
        missing = missing_images(stored.values(), self._host.config.image_states, None)
        for disk in stored.values():
            details = {"disk": disk.name, "path": str(disk.path)}
            if disk.id in missing - self._missing.keys():
                _log.warning("image-missing", extra=fields(details))
            elif disk.id in self._missing.keys() - missing:
                _log.info("image-back", extra=fields(details))
        self._missing = {disk_id: stored[disk_id] for disk_id in missing}
        self._metrics.missing_images.set(len(missing))

    def _is_missing(self, disk_id: UUID) -> bool:
        path = self._images.path(disk_id)
        return path is not None and not is_rbd(path) and not os.path.lexists(path)

    def _report_plain(self) -> None:
        seen = dict(_beside(self._images.by_folder()))
        suspects = {file: path for file, path in seen.items() if file not in self._encrypted}
        disks = {disk.path: disk for disk in self._host.store.at_paths(set(suspects.values()))}
        found = {}
        for file, path in suspects.items():
            disk = disks.get(path)
            if disk is None or disk.kind is not DiskKind.DISK:
                continue  # no domain writes beside a copy
            if file in self._plain or _is_plain(file[0], disk.size):
                found[file] = disk
            else:
                self._encrypted.add(file)
        self._encrypted &= seen.keys()
        for file, disk in found.items():
            if file not in self._plain:
                details = {"disk": disk.name, "place": str(file[0])}
                _log.warning("plaintext-beside", extra=fields(details))
        self._plain = found
        self._metrics.plaintext_beside.set(len(found))


def _beside(by_folder: Mapping[Path, Mapping[str, Path]]) -> Iterator[tuple[_File, Path]]:
    """Files named as an image with a suffix, e.g. by libvirt's backups, each with the path of the image.

    :param by_folder: the paths of images by folder and name.
    """
    for folder, images in by_folder.items():
        for name in _names(folder):
            image = images.get(name.rpartition(".")[0])
            if image is None or name in images:
                continue
            try:
                status = os.lstat(folder / name)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield (folder / name, status.st_ino, status.st_mtime_ns), image


def _names(folder: Path) -> list[str]:
    """The names in a folder; none if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except OSError:
        return []


def _is_plain(path: Path, size: int) -> bool:
    """Whether a file is like an unencrypted copy of a disk of *size* bytes."""
    try:
        with image_file.opened(path) as descriptor:
            return image_file.is_plain_copy(descriptor, size)
    except ImageError:
        return False
