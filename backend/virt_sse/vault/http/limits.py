"""Load limits: excess requests get 429 at once, so that accepted requests stay fast."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from virt_sse.errors import InvalidValueError
from virt_sse.vault.http.requests import refuse
from virt_sse.vault.rate_limit import RateLimit
from virt_sse.vault.refusals import throttled, unavailable

_HEALTH = "/healthz"


@dataclass(frozen=True, slots=True)
class Limits:
    """Load limits of a vault.

    :ivar concurrency: maximum of concurrent requests.
    :ivar rate: maximum of requests a second on average; 0 for no limit. Bursts of one second are allowed.
    """

    concurrency: int = 512
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or not 0 <= self.rate < math.inf:
            raise InvalidValueError(
                "the concurrency limit must be at least 1, and the rate limit not negative"
            )


class Limiter:
    """Keeps *app* within *limits*. For the event loop's thread only."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._under_way = 0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._rate_limit = RateLimit(limits.rate, max(1.0, limits.rate)) if limits.rate else None

    def close(self) -> None:
        """Refuse new requests."""
        self._closing = True

    async def idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _HEALTH:
            await self._app(scope, receive, send)
            return
        if self._closing:
            await refuse(scope, send, unavailable("The vault is stopping."))
            return
        wait = 1.0 if self._under_way >= self._limits.concurrency else 0.0
        if not wait and self._rate_limit is not None:
            wait = self._rate_limit.take()
        if wait:
            await refuse(scope, send, throttled(math.ceil(wait)))
            return
        self._under_way += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
