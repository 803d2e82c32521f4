"""Base classes of workers: agent parts with worker threads, called with each snapshot of running domains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.logs import fields

_log = logging.getLogger(__name__)

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


class SingleWorker:
    """Does one piece of work at a time in a thread of its own; leaves out the work of snapshots meanwhile.

    A daemon thread: the agent ends although the work waits for a storage that hangs.

    :param name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._seen = 0
        self._complaint: str | None = None

    def submit(self, number: int, work: Callable[..., None], *arguments: object) -> None:
        """Do *work*, unless other work is under way or the number was seen before."""
        if number != self._seen and (self._thread is None or not self._thread.is_alive()):
            self._seen = number
            self._thread = threading.Thread(
                target=self._run, args=(work, *arguments), name=self._name, daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Wait for work under way, up to two seconds."""
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
            self._complaint = None
        except Exception as exc:  # noqa: BLE001 -- one failure must not end the watch
            if str(exc) != self._complaint:  # once, while the failure lasts
                self._complaint = str(exc)
                _log.warning("watch-failed", extra=fields({"watch": self._name, "reason": str(exc)}))
