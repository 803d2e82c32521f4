"""The paths of the store's images, kept up to date by the changes since the last look.

A store shared by a hundred hosts may have ten thousand disks: no host reads them all at every look.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from uuid import UUID

from virt_sse.store.image_paths import ImagePaths
from virt_sse.store.store import Store

_REREAD_SECONDS = 3600.0
"""Until then, paths of removed disks stay: whoever finds a path asks the store."""

_ALL = -1


class KnownImages:
    """The paths by disk, in memory and in the file of paths; for a single thread."""

    def __init__(self, store: Store, file: ImagePaths) -> None:
        self._store = store
        self._file = file
        self._number = _ALL
        self._paths: dict[UUID, Path] = {}
        self._by_folder: dict[Path, dict[str, Path]] | None = None
        self._reread = 0.0

    def update(self) -> None:
        """Read the paths of new and moved images; at times, and if the file of paths was lost, all paths.

        :raise StoreError: When the store cannot be queried.
        :raise OSError: When the file cannot be written.
        """
        if time.monotonic() >= self._reread or not self._file.is_kept():
            self._file.replace(self._read_all)
            self._reread = time.monotonic() + _REREAD_SECONDS
            return
        number, changed = self._store.paths_since(self._number)
        if changed:
            self._file.append(changed.values())
            self._paths |= changed
            self._by_folder = None
        self._number = number

    def path(self, disk_id: UUID) -> Path | None:
        """The path of a disk's image, if the store had the disk at the last reading of all paths or later."""
        return self._paths.get(disk_id)

    def forget(self, disk_ids: Collection[UUID]) -> None:
        """Leave out disks that the store does not have any more."""
        for disk_id in disk_ids:
            self._paths.pop(disk_id, None)
            self._by_folder = None

    def by_folder(self) -> Mapping[Path, Mapping[str, Path]]:
        """The paths by folder and name."""
        if self._by_folder is None:
            self._by_folder = defaultdict(dict)
            for path in self._paths.values():
                self._by_folder[path.parent][path.name] = path
        return self._by_folder

    def _read_all(self) -> Collection[Path]:
        self._number, self._paths = self._store.paths_since(_ALL)
        self._by_folder = None
        return self._paths.values()
