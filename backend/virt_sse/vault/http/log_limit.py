"""Limits of log lines that strangers can cause."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

_SECONDS = 60.0


class LogLimit(logging.Filter):
    """Passes each message, whatever its arguments, once a minute, with the number of messages suppressed.

    Messages are told apart by their format, so the number of remembered messages is bounded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide whether *record* is logged."""
        key, now = str(record.msg), self._clock()
        then, suppressed = self._seen.get(key, (float("-inf"), 0))
        if now - then < _SECONDS:
            self._seen[key] = (then, suppressed + 1)
            return False
        self._seen[key] = (now, 0)
        if suppressed:
            record.msg = f"{key.rstrip()} ({suppressed} more since the last line)"
        return True


@contextlib.contextmanager
def limited(names: Sequence[str]) -> Iterator[None]:
    """Limit the log lines of the loggers *names* within the block."""
    filters = [(logging.getLogger(name), LogLimit()) for name in names]
    for logger, limit in filters:
        logger.addFilter(limit)
    try:
        yield
    finally:
        for logger, limit in filters:
            logger.removeFilter(limit)
