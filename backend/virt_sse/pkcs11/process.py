"""The separate process of a PKCS#11 module, seen by its caller.

A module that hangs or crashes affects only the calls to this module. Keys which the module keeps in memory,
as SoftHSM does, stay out of the caller's memory. Initialisation, configuration and login of the module are
not shared with other code in the caller's process. The process may run as a user of its own.

The module's process is not trusted: see :mod:`virt_sse.pkcs11.messages`. A process that breaks the protocol
or ignores its time limit is killed.
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
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import msgspec

from virt_sse.errors import KeyProviderUnavailableError, VirtSseError
from virt_sse.pkcs11 import messages
from virt_sse.pkcs11.messages import Channel, MessageError, PinWanted, Refused, Returned
from virt_sse.pkcs11.pins import GuardedPin
from virt_sse.pkcs11.worker_user import WorkerUser

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")

_MAIN = "from virt_sse.pkcs11.worker import main; main()"

_GRACE_SECONDS = 5.0
"""Time after a call's time limit until the process is killed; an honest process ends itself at the limit."""

_START_SECONDS = 30.0
"""Time for a new process to start and to import its program, on a busy machine."""

_MOST_LOGINS = 100
"""Number of logins within a call; an honest process needs a few after each restart of its module."""


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    channel: Channel


@dataclass(frozen=True, slots=True)
class _Call:
    """An encoded call.

    :ivar seconds: time limit; the process ends itself then.
    :ivar patience: seconds until the process is killed.
    """

    seconds: float
    patience: float
    frame: bytes = field(repr=False)  # PINs may be among the arguments
    result: msgspec.msgpack.Decoder[Any]


class ModuleProcess(Generic[S]):
    """Calls functions on an object in the module's process.

    The process is started on demand, and restarted after it ended. Safe to use from several threads, and
    after a fork: the child starts its own process.

    :param make: makes the object from :class:`~virt_sse.pkcs11.pins.Logins` and *arguments*. Sent by name,
        as are the functions passed to :meth:`call`, with the result's type in the annotations.
    :param logins: the PIN, if the module needs a login. The PIN is read, and its use counted, in this
        process.
    :param environment: variables to set in the module's environment.
    :param user: user of the process; the caller's by default.
    :param seconds: time limit for making the object.
    """

    def __init__(
        self,
        make: Callable[..., S],
        *arguments: object,
        logins: GuardedPin | None = None,
        environment: Mapping[str, str],
        user: WorkerUser | None = None,
        seconds: float,
    ) -> None:
        self._user = user
        self._making_seconds = seconds
        self._make = make
        self.make_of(*arguments)
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
        :raise InvalidValueError: When an argument has no encoding.
        :raise KeyProviderUnavailableError: When the process ends during the call, breaks the protocol, or
            cannot be started.
        """
        if kwargs:
            raise TypeError("arguments of a call to a module's process are positional")
        call = _Call(
            seconds,
            seconds + _GRACE_SECONDS,
            messages.call_frame(seconds, work, args),
            messages.result_decoder(work),
        )
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
            answer: T = self._ask(self._running, call)
            return answer

    def make_of(self, *arguments: object) -> None:
        """Set the *arguments* for making the object in the next process."""
        self._making = _Call(
            self._making_seconds,
            self._making_seconds + _START_SECONDS + _GRACE_SECONDS,
            messages.call_frame(self._making_seconds, self._make, arguments),
            messages.NOTHING,
        )

    def close(self) -> None:
        """End the process after its current call. Raises nothing."""
        with self._lock:
            self._end()

    def _start(self) -> _Running:
        user = self._user
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
                    user=user.uid if user else None,
                    group=user.gid if user else None,
                    extra_groups=user.groups if user else None,
                )
            except (OSError, subprocess.SubprocessError) as exc:
                ours.close()
                raise KeyProviderUnavailableError(
                    f"cannot start a process for the PKCS#11 module{_as(user)}: {exc}"
                ) from exc
        return _Running(process, Channel(ours))

    def _ask(self, running: _Running, call: _Call) -> Any:
        try:
            answer = self._answer(running, call)
            if isinstance(answer, Refused):
                error: VirtSseError = answer.error()
            else:
                return messages.decode(answer.value, call.result)
        except (EOFError, ConnectionError) as exc:
            status = self._end()
            why = _why(status, call.seconds)
            if status == -signal.SIGALRM:
                self._hung = (time.monotonic(), why)
            raise KeyProviderUnavailableError(why) from exc
        except TimeoutError as exc:
            self._kill()
            why = _why(-signal.SIGALRM, call.seconds)
            self._hung = (time.monotonic(), why)
            raise KeyProviderUnavailableError(why) from exc
        except MessageError as exc:
            self._kill()
            raise KeyProviderUnavailableError(
                f"the process of the PKCS#11 module broke the protocol: {exc}"
            ) from exc
        except BaseException:
            self._end(call.patience)  # otherwise the next call would receive the answer to this one
            raise
        raise error

    def _answer(self, running: _Running, call: _Call) -> Returned | Refused:
        deadline = time.monotonic() + call.patience
        running.channel.send(call.frame, deadline)
        for _ in range(_MOST_LOGINS):
            answer = messages.decode(running.channel.receive(deadline), messages.ANSWERS)
            if not isinstance(answer, PinWanted):
                return answer
            deadline += self._log_in(running, deadline, is_last=answer.is_last)
        raise MessageError(f"more than {_MOST_LOGINS} logins")

    def _log_in(self, running: _Running, deadline: float, *, is_last: bool) -> float:
        """Send the PIN, and count the attempt. Returns the seconds spent on obtaining the PIN."""
        if self._logins is None:
            raise MessageError("asks for a PIN where no login is due")
        began = time.monotonic()
        with self._logins.attempt(is_last=is_last) as (pin, attempt):
            spent = time.monotonic() - began
            deadline += spent
            try:
                running.channel.send(pin.text.encode(), deadline)
                attempt.outcome = messages.decode(running.channel.receive(deadline), messages.OUTCOMES)
            except (EOFError, ConnectionError):
                if _wait(running.process, _GRACE_SECONDS) == -signal.SIGALRM:
                    attempt.inconclusive()
                raise
        return spent

    def _end(self, patience: float | None = None) -> int:
        """End the process after its current call.

        :param patience: seconds until the process is killed; by default, for a process without a call.
        :return: the :attr:`subprocess.Popen.returncode`.
        """
        running, self._running = self._running, None
        if running is None:
            return 0
        running.channel.close()
        return _wait(running.process, _GRACE_SECONDS if patience is None else patience)

    def _kill(self) -> None:
        if self._running is not None:
            self._running.process.kill()
        self._end()

    def _forked(self) -> None:
        """Leave the process to our parent."""
        self._lock = threading.RLock()
        running, self._running = self._running, None
        if running is not None:
            running.channel.close()
            running.process.poll()  # not a child of this process: makes Popen give up on waiting


def _as(user: WorkerUser | None) -> str:
    return f" as user {user.uid}" if user else ""


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for the process's end; kill the process after *seconds*. Returns the exit status."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


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
