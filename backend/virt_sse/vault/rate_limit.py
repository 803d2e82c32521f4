"""A rate limit with bursts (token bucket)."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimit:
    """At most *rate* events a second on average, *burst* of them at once. Not thread-safe."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._then = burst, clock()

    def take(self) -> float:
        """Count an event, if the limit allows.

        :return: 0, or the seconds until the next event is allowed.
        """
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0
