"""Load limits: excess requests get 429 at once, so that accepted requests stay fast."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from virt_sse.errors import InvalidValueError
from virt_sse.vault.http.requests import refuse
from virt_sse.vault.rate_limit import RateLimit
from virt_sse.vault.refusals import throttled, unavailable

_HEALTH = "/healthz"


@dataclass(frozen=True, slots=True)
class Limits:
    """Load limits of a vault.

    :ivar concurrency: maximum of concurrent requests, not counting requests whose body has not arrived.
    :ivar rate: maximum of requests a second on average; 0 for no limit. Bursts of one second are allowed.
    :ivar connections: maximum of connections; fewer if the process may open too few descriptors.
    :ivar connections_per_address: maximum of connections per IPv4 address or IPv6 network (/64).
    :ivar request_seconds: time for a TLS handshake, and for a request's headers.
    :ivar idle_seconds: time between two requests of a connection.
    """

    concurrency: int = 512
    rate: float = 0.0
    connections: int = 1024
    connections_per_address: int = 256
    request_seconds: float = 10.0
    idle_seconds: float = 75.0

    def __post_init__(self) -> None:
        if min(self.connections, self.connections_per_address) < 1:
            raise InvalidValueError("the limits of connections must be at least 1")
        if not (0 < self.request_seconds < math.inf and 0 < self.idle_seconds < math.inf):
            raise InvalidValueError("the time limits of connections must be positive")
        if self.concurrency < 1 or not 0 <= self.rate < math.inf:
            raise InvalidValueError(
                "the concurrency limit must be at least 1, and the rate limit not negative"
            )


class TooManyRequestsError(Exception):
    """The request's body arrived while too many other requests were running."""


class Limiter:
    """Keeps *app* within *limits*. For the event loop's thread only."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._under_way = 0
        self._waiting = 0
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

    @property
    def _running(self) -> int:
        """The number of requests at work; a client that withholds its body must not block others."""
        return self._under_way - self._waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _HEALTH:
            await self._app(scope, receive, send)
            return
        if self._closing:
            await refuse(scope, send, unavailable("The vault is stopping."))
            return
        wait = 1.0 if self._running >= self._limits.concurrency else 0.0
        if not wait and self._rate_limit is not None:
            wait = self._rate_limit.take()
        if wait:
            await refuse(scope, send, throttled(math.ceil(wait)))
            return

        async def received() -> Message:
            self._waiting += 1
            try:
                message = await receive()
            finally:
                self._waiting -= 1
            if self._running > self._limits.concurrency:
                raise TooManyRequestsError
            return message

        self._under_way += 1
        self._idle.clear()
        try:
            await self._app(scope, received, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
