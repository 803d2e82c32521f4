"""Base class of workers: agent parts with worker threads, called with each snapshot of running domains."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from virt_sse.agent.inventory import InventorySnapshot

_THREADS = 4

Resource = TypeVar("Resource")


class SnapshotWorker(Generic[Resource]):
    """Keeps resources of running domains: restores missing resources, and removes unused resources.

    :param name: prefix of the worker threads' names.
    :param unused_seconds: how long a resource must be unused before removal, because a command creates the
        resource shortly before the domain has the disk.
    """

    def __init__(self, name: str, unused_seconds: float) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._unused: dict[Resource, float] = {}
        self._unused_seconds = unused_seconds
        self._seen = 0

    def stop(self) -> None:
        """Start no more work, and wait for work under way."""
        self._pool.shutdown(cancel_futures=True)

    def _is_new(self, snapshot: InventorySnapshot) -> bool:
        """Whether *snapshot* was not seen before."""
        before, self._seen = self._seen, snapshot.number
        return before != snapshot.number

    def _overdue(self, unused: Collection[Resource], now: float) -> list[Resource]:
        """The resources of *unused* to remove now.

        A resource stays overdue until a domain uses the resource again, or a subclass deletes the
        resource from ``_unused``.

        :param now: of ``time.monotonic()``.
        """
        with self._lock:
            for used in self._unused.keys() - set(unused):
                del self._unused[used]
            since = {each: self._unused.setdefault(each, now) for each in unused}
        return [each for each, begin in since.items() if begin <= now - self._unused_seconds]
