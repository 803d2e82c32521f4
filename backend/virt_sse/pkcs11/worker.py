"""What the process of a PKCS#11 module does: what it is asked over a socket, until that ends.

Both ends are the same program and the same user, so what goes between them may be pickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from virt_sse.errors import VirtSseError
from virt_sse.pkcs11.pins import Attempt, Pin

_PR_SET_DUMPABLE = 4

Request = tuple[float, Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""How many seconds it may take, what to call, and with what after its first argument. In the first request
that is a :class:`CallersPin`, and in the others what came of the first.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What came of a request: an error, or else the value."""

    value: Any = field(default=None, repr=False)
    error: VirtSseError | None = None


@dataclass(frozen=True, slots=True)
class PinWanted:
    """The caller is to send the PIN, and is sent :attr:`Attempt.outcome`, before there is an answer."""

    is_last: bool


class CallersPin:
    """The PIN, as :class:`~virt_sse.pkcs11.pins.Logins` has it: the caller knows it, and counts the tries."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel

    @contextlib.contextmanager
    def attempt(self, *, is_last: bool) -> Iterator[tuple[Pin, Attempt]]:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # somebody may have to type it
        self._channel.send(PinWanted(is_last))
        pin = Pin(self._channel.recv_bytes().decode())
        signal.setitimer(signal.ITIMER_REAL, left)
        attempt = Attempt()
        try:
            yield pin, attempt
        finally:
            self._channel.send(attempt.outcome)


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot keep others from reading the memory of a token's process")
    with contextlib.suppress(EOFError, ConnectionError):  # nobody asks any more
        _serve(Connection(int(sys.argv[1])))
    os._exit(0)  # without what a module does at the end of a process, which may hang, too


def _serve(channel: Connection) -> None:
    made = _answer(channel.recv(), CallersPin(channel))
    channel.send(Answer(error=made.error))
    while made.error is None:
        channel.send(_answer(channel.recv(), made.value))


def _answer(request: Request, subject: Any) -> Answer:
    seconds, work, arguments, named = request
    # Nothing but a signal that is not handled ends a call that hangs in a module.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return Answer(work(subject, *arguments, **named))
    except VirtSseError as exc:
        return Answer(error=exc)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
