"""Main loop of a PKCS#11 module's process: serve requests from a socket until the caller closes the socket.

Both ends are the same program, run by the same user: pickled messages are safe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from virt_sse.errors import VirtSseError
from virt_sse.pkcs11.pins import Attempt, Pin
from virt_sse.system.process_hardening import protect_memory

Request = tuple[float, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""Time limit in seconds, function to call, its positional arguments after the first, its named arguments.

The first argument is a :class:`CallersPin` in the first request, and the first request's result in later
requests.
"""


@dataclass(frozen=True, slots=True, eq=False)
class WorkerAnswer:
    """Result of a request: an error or a value."""

    value: Any = field(default=None, repr=False)
    error: VirtSseError | None = None


@dataclass(frozen=True, slots=True)
class PinWanted:
    """Asks the caller for the PIN. The worker then sends :attr:`Attempt.outcome`, and later the result."""

    is_last: bool


class CallersPin:
    """Worker side of :class:`~virt_sse.pkcs11.pins.Logins`: the caller reads PINs and counts attempts."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel

    @contextlib.contextmanager
    def attempt(self, *, is_last: bool) -> Iterator[tuple[Pin, Attempt]]:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # a user may have to type the PIN
        self._channel.send(PinWanted(is_last))
        pin = Pin(self._channel.recv_bytes().decode())
        signal.setitimer(signal.ITIMER_REAL, left)
        attempt = Attempt()
        try:
            yield pin, attempt
        finally:
            self._channel.send(attempt.outcome)


def main() -> None:
    """Serve the socket given by file descriptor as the first argument."""
    protect_memory()
    with contextlib.suppress(EOFError, ConnectionError):  # the caller has gone
        _serve(Connection(int(sys.argv[1])))
    os._exit(0)  # skips the module's exit handlers: they may hang, too


def _serve(channel: Connection) -> None:
    made = _answer(channel.recv(), CallersPin(channel))
    channel.send(WorkerAnswer(error=made.error))
    while made.error is None:
        channel.send(_answer(channel.recv(), made.value))


def _answer(request: Request, subject: Any) -> WorkerAnswer:
    seconds, work, arguments, named = request
    # Only an unhandled signal ends a call hanging inside a module.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return WorkerAnswer(work(subject, *arguments, **named))
    except VirtSseError as exc:
        return WorkerAnswer(error=exc)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
