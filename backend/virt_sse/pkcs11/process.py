"""The separate process of a PKCS#11 module, seen by its caller.

A module that hangs or crashes affects only the calls to this module. Keys which the module keeps in memory,
as SoftHSM does, stay out of the caller's memory. Initialisation, configuration and login of the module are
not shared with other code in the caller's process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from virt_sse.errors import KeyProviderUnavailableError
from virt_sse.pkcs11.pins import GuardedPin
from virt_sse.pkcs11.worker import PinWanted, Request

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")

_MAIN = "from virt_sse.pkcs11.worker import main; main()"


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    channel: Connection


class ModuleProcess(Generic[S]):
    """Calls functions on an object in the module's process.

    The process is started on demand, and restarted after it ended. Safe to use from several threads, and
    after a fork: the child starts its own process.

    :param make: makes the object from :class:`~virt_sse.pkcs11.pins.Logins` and *arguments*. Pickled by name,
        as are the functions passed to :meth:`call`.
    :param logins: the PIN, if the module needs a login. The PIN is read, and its use counted, in this
        process.
    :param environment: variables to set in the module's environment.
    :param seconds: time limit for making the object.
    """

    def __init__(
        self,
        make: Callable[..., S],
        *arguments: object,
        logins: GuardedPin | None = None,
        environment: Mapping[str, str],
        seconds: float,
    ) -> None:
        self._making: Request = (seconds, make, arguments, {})
        self._logins = logins
        self._environment = environment
        self._lock = threading.RLock()
        self._running: _Running | None = None
        self._hung: tuple[float, str] = (0.0, "")
        _all.add(self)

    @property
    def pid(self) -> int | None:
        """The process ID, if the process is running."""
        running = self._running
        return running.process.pid if running is not None else None

    def call(
        self, seconds: float, work: Callable[Concatenate[S, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call *work* on the object in the module's process, and return its result.

        :param seconds: time limit; the process is ended after this time.
        :raise VirtSseError: When *work* or making the object raises a subclass of this error.
        :raise KeyProviderUnavailableError: When the process ends during the call, or cannot be started.
        """
        asked = time.monotonic()
        with self._lock:
            when, why = self._hung
            if when > asked:  # the process hung while this call waited for the lock: fail at once
                raise KeyProviderUnavailableError(why)
            if self._running is None or self._running.process.poll() is not None:
                self._end()
                self._running = self._start()
                try:
                    self._ask(self._running, self._making)
                except BaseException:
                    self._end()
                    raise
            answer: T = self._ask(self._running, (seconds, work, args, kwargs))
            return answer

    def make_of(self, *arguments: object) -> None:
        """Set the *arguments* for making the object in the next process."""
        seconds, make, _, named = self._making
        self._making = (seconds, make, arguments, named)

    def close(self) -> None:
        """End the process after its current call. Raises nothing."""
        with self._lock:
            self._end()

    def _start(self) -> _Running:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C must not interrupt a write of the token
                    env={**os.environ, **self._environment},
                )
            except OSError as exc:
                ours.close()
                raise KeyProviderUnavailableError(
                    f"cannot start a process for the PKCS#11 module: {exc.strerror}"
                ) from exc
        return _Running(process, Connection(ours.detach()))

    def _ask(self, running: _Running, request: Request) -> Any:
        try:
            running.channel.send(request)
            while isinstance(answer := running.channel.recv(), PinWanted):
                self._log_in(running, is_last=answer.is_last)
        except (EOFError, ConnectionError) as exc:
            status = self._end()
            why = _why(status, request[0])
            if status == -signal.SIGALRM:
                self._hung = (time.monotonic(), why)
            raise KeyProviderUnavailableError(why) from exc
        except BaseException:
            self._end()  # otherwise the next call would receive the answer to this one
            raise
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _log_in(self, running: _Running, *, is_last: bool) -> None:
        if self._logins is None:
            raise TypeError("no PIN was given for this module")
        with self._logins.attempt(is_last=is_last) as (pin, attempt):
            try:
                running.channel.send_bytes(pin.text.encode())
                attempt.outcome = running.channel.recv()
            except (EOFError, ConnectionError):
                if running.process.wait() == -signal.SIGALRM:
                    attempt.inconclusive()
                raise

    def _end(self) -> int:
        """End the process; returns its :attr:`subprocess.Popen.returncode`."""
        running, self._running = self._running, None
        if running is None:
            return 0
        running.channel.close()
        return running.process.wait()

    def _forked(self) -> None:
        """Leave the process to our parent."""
        self._lock = threading.RLock()
        running, self._running = self._running, None
        if running is not None:
            running.channel.close()
            running.process.poll()  # not a child of this process: makes Popen give up on waiting


def _why(status: int, seconds: float) -> str:
    if status == -signal.SIGALRM:
        return f"the PKCS#11 module did not answer within {seconds:g} s"
    if status < 0:
        return f"the PKCS#11 module crashed its process ({signal.Signals(-status).name})"
    return f"the process of the PKCS#11 module failed (exit status {status})"


_all: weakref.WeakSet[ModuleProcess[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for each in _all:
        each._forked()


os.register_at_fork(after_in_child=_after_fork)
