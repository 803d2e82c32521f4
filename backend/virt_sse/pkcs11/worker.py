"""Main loop of a PKCS#11 module's process: serve calls from a socket until the caller closes the socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from virt_sse.errors import VirtSseError
from virt_sse.pkcs11 import messages
from virt_sse.pkcs11.messages import Channel, PinWanted
from virt_sse.pkcs11.pins import Attempt, Pin
from virt_sse.system.process_hardening import protect_memory


class CallersPin:
    """Worker side of :class:`~virt_sse.pkcs11.pins.Logins`: the caller reads PINs and counts attempts."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @contextlib.contextmanager
    def attempt(self, *, is_last: bool) -> Iterator[tuple[Pin, Attempt]]:
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # a user may have to type the PIN
        self._channel.send(messages.encode(PinWanted(is_last)))
        pin = Pin(self._channel.receive().decode())
        signal.setitimer(signal.ITIMER_REAL, left)
        attempt = Attempt()
        try:
            yield pin, attempt
        finally:
            self._channel.send(messages.encode(attempt.outcome))


def main() -> None:
    """Serve the socket given by file descriptor as the first argument."""
    protect_memory()
    with contextlib.suppress(EOFError, ConnectionError):  # the caller has gone
        _serve(Channel(socket.socket(fileno=int(sys.argv[1]))))
    os._exit(0)  # skips the module's exit handlers: they may hang, too


def _serve(channel: Channel) -> None:
    """Make an object by the first call, then pass the object to the function of each later call."""
    try:
        made = _call(channel.receive(), CallersPin(channel))
    except VirtSseError as exc:
        channel.send(messages.refused_frame(exc))
        return
    channel.send(messages.returned_frame(None))
    while True:
        content = channel.receive()
        try:
            frame = messages.returned_frame(_call(content, made))
        except VirtSseError as exc:
            frame = messages.refused_frame(exc)
        channel.send(frame)


def _call(content: bytes, subject: Any) -> Any:
    seconds, work, arguments = messages.read_call(content)
    # Only an unhandled signal ends a call hanging inside a module.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work(subject, *arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
