"""Deadlines for whole exchanges with a server. A socket's timeout limits each read alone: a server that sends
one byte at a time would hold its client for hours.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let the reads of a :class:`DeadlineSocket` in the block end *seconds* from now by ``TimeoutError``."""
    before, deadline = _deadline.get(), time.monotonic() + seconds
    token = _deadline.set(deadline if before is None else min(before, deadline))
    try:
        yield
    finally:
        _deadline.reset(token)


def remaining() -> float | None:
    """Seconds until the deadline of :func:`within`, 0 or more; ``None`` outside of its blocks."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class DeadlineSocket(ssl.SSLSocket):
    """A TLS connection whose reads end at the deadline of :func:`within`; for ``SSLContext.sslsocket_class``.

    A handshake is limited by the socket's timeout as a whole.
    """

    def read(self, *arguments: Any, **named: Any) -> Any:
        """As ``ssl.SSLSocket.read``.

        :raise TimeoutError: At the deadline.
        """
        left = remaining()
        if left is not None:
            if left <= 0:
                raise TimeoutError("the answer takes too long")
            timeout = self.gettimeout()
            if timeout is None or timeout > left:
                self.settimeout(left)
        return super().read(*arguments, **named)
