"""How far the caches of an instance may be behind the changes of other instances."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from virt_sse.vault.home.database import Database
from virt_sse.vault.refusals import FailureRefusal

_log = logging.getLogger(__name__)

LOGGER = _log.name

FRESH_SECONDS = 0.25


class Freshness:
    """Drops an instance's caches after changes by other instances. Thread-safe.

    A request answered after :meth:`check` knows every change committed :data:`FRESH_SECONDS` before. If the
    database does not answer, the check fails, and so does the request: an instance that is cut off from the
    database does not go on with a key that may be disabled.

    :ivar shared: whether there may be other instances.
    :param forget: drop one cache each; the caches may have been filled before this call.
    """

    def __init__(self, database: Database, forget: Sequence[Callable[[], None]]) -> None:
        self.shared = database.shared
        self._database = database
        self._forget = forget
        self._known: int | None = None
        self._asked = float("-inf")
        self._lock = threading.Lock()

    def due(self, since: float | None = None) -> bool:
        """Whether :meth:`check` has to ask the database."""
        if since is None:
            since = time.monotonic() - FRESH_SECONDS
        return self.shared and self._asked < since

    def check(self, since: float | None = None) -> None:
        """Drop the caches if the database has changed.

        :param since: asks the database unless it was asked after this time, on the monotonic clock; by
            default :data:`FRESH_SECONDS` ago.
        :raise Refusal: When the database cannot be read.
        """
        if not self.due(since):
            return
        with self._lock:
            if not self.due(since):  # another thread has just asked
                return
            asked = time.monotonic()
            try:
                number = self._database.changes()
            except FailureRefusal as refusal:
                _log.error("no request is served: %s", refusal.detail)
                raise
            if number != self._known:
                for forget in self._forget:
                    forget()
            self._known, self._asked = number, asked
