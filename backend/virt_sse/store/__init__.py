"""The store: an index of all disks and their wrapped DEKs. Never contains an unwrapped DEK.

:class:`LazyStore` opens the store as far as a command needs it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from virt_sse.store.reader import StoreReader, StoreReads

if TYPE_CHECKING:
    from virt_sse.store.image_paths import ImagePaths
    from virt_sse.store.store import Store

__all__ = ["LazyStore", "StoreReads"]


class LazyStore:
    """A store, opened at its first use.

    :param url: SQLAlchemy URL.
    :param image_paths: file that gets the paths of new images.
    """

    def __init__(self, url: str, image_paths: ImagePaths | None = None) -> None:
        self._url = url
        self._image_paths = image_paths
        self._lock = threading.Lock()
        self._store: Store | None = None

    def full(self) -> Store:
        """The whole store, with SQLAlchemy.

        :raise StoreError: When the database cannot be opened.
        """
        with self._lock:
            if self._store is None:
                from virt_sse.store.store import Store

                self._store = Store(self._url, self._image_paths)
            return self._store

    def reads(self) -> StoreReads:
        """The store for queries: without SQLAlchemy if the store is in SQLite, current, and not yet open.

        :raise StoreError: When the database cannot be opened.
        """
        return (None if self._store else StoreReader.of(self._url)) or self.full()

    def close(self) -> None:
        """Close all connections."""
        if self._store:
            self._store.close()
