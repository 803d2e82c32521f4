"""PINs: where they come from, and the lock-out after wrong ones."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, Self

from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.system.files import PRIVATE_FILE, private_folder, sync_folder

UNLOCK_HINT = "put the PIN right, then 'virt-sse host hsm unlock', or 'vault hsm unlock' for a vault's"

MOST_WRONG = 3
"""So many wrong PINs in a row lock a token out."""

_LONGEST = 255
"""In bytes; what PKCS#11 modules take."""


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """A PIN. Cannot print or pickle itself."""

    text: str = field(repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PIN cannot be pickled")


class PinSource:
    """Where a PIN comes from: a file, an open descriptor or a prompt; no argument and no environment."""

    def __init__(self, description: str, read: Callable[[], bytes]) -> None:
        self._description = description
        self._read = read

    def __repr__(self) -> str:
        return f"PinSource({self._description})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("where a PIN comes from cannot be pickled")

    @classmethod
    def file(cls, path: Path) -> Self:
        """The first line of *path*, read anew at each use; it must be readable by its owner alone."""
        return cls(str(path), lambda: _private_content(path))

    @classmethod
    def descriptor(cls, number: int) -> Self:
        """The first line of what the open descriptor gives, read to its end once, at the first use."""
        return cls(f"descriptor {number}", _once(lambda: _content(number)))

    @classmethod
    def prompt(cls, ask: Callable[[], str]) -> Self:
        """What *ask* returns; it is asked once, at the first use."""
        return cls("prompt", _once(lambda: ask().encode()))

    def read(self) -> Pin:
        """The PIN.

        :raise ConfigError: When there is none, or others could have read it.
        """
        try:
            text = self._read().split(b"\n", 1)[0].removesuffix(b"\r").decode("utf-8")
        except OSError as exc:
            raise ConfigError(f"cannot read the PIN ({self._description}): {exc.strerror}") from exc
        except UnicodeDecodeError:  # which would show the bytes
            raise ConfigError(f"the PIN is not UTF-8 ({self._description})") from None
        if not text or len(text.encode()) > _LONGEST or "\0" in text:
            raise ConfigError(f"the PIN has to have 1 to {_LONGEST} bytes ({self._description})")
        return Pin(text)


class PinGuard:
    """Counts wrong PINs in the file *path*, over threads, processes and restarts, and refuses after too many.

    A token without a lock-out of its own, as SoftHSM is, gets one; and one with is never locked out by a
    wrong PIN in a file, since it is not asked any more. A try is counted before the token is asked, and
    taken back when the PIN was right: ``kill -9`` in between gains a guesser nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"PinGuard({self._path})"

    def failures(self) -> int:
        """How many tries in a row have failed.

        :raise ConfigError: When the file cannot be read.
        """
        if not self._path.exists():
            return 0
        with self._open() as descriptor:
            return self._failures(descriptor)

    def reset(self) -> None:
        """Forget them: for an administrator.

        :raise ConfigError: When the file cannot be written.
        """
        with self._open() as descriptor:
            _write(descriptor, 0)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Around one login, alone among all processes. It has failed unless the caller says otherwise.

        :raise KeyProviderUnavailableError: When there were too many wrong ones; the token is not to be asked.
        :raise ConfigError: When the file cannot be read or written.
        """
        with self._open() as descriptor:
            failures = self._failures(descriptor)
            if failures >= MOST_WRONG:
                raise KeyProviderUnavailableError(
                    f"the token is locked after {failures} wrong PINs",
                    hint=UNLOCK_HINT,
                )
            _write(descriptor, failures + 1)
            attempt = Attempt()
            try:
                yield attempt
            finally:
                if attempt.outcome is not PinOutcome.WRONG:
                    _write(descriptor, 0 if attempt.outcome is PinOutcome.RIGHT else failures)

    def _failures(self, descriptor: int) -> int:
        text = os.pread(descriptor, 16, 0).strip()
        if not text:  # just made
            return 0
        return int(text) if text.isdigit() else MOST_WRONG

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        try:
            private_folder(self._path.parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, PRIVATE_FILE)
            try:
                _require_private(self._path, os.fstat(descriptor))
                sync_folder(self._path.parent)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as exc:
            raise ConfigError(f"cannot count wrong PINs in {self._path}: {exc.strerror}") from exc
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class Logins(Protocol):
    """Gives a PIN away, for one login at a time."""

    def attempt(self, *, is_last: bool) -> AbstractContextManager[tuple[Pin, Attempt]]:
        """The PIN, and what is to be told of it.

        :param is_last: whether the token would lock itself after a wrong one.
        :raise KeyProviderUnavailableError: When the token is not to be asked: as *is_last*, or as for
            :meth:`PinGuard.attempt`.
        :raise ConfigError: When there is no PIN, or its use cannot be counted.
        """


class GuardedPin:
    """A PIN whose wrong ones are counted."""

    def __init__(self, source: PinSource, guard: PinGuard) -> None:
        self._source = source
        self._guard = guard

    @contextlib.contextmanager
    def attempt(self, *, is_last: bool) -> Iterator[tuple[Pin, Attempt]]:
        pin = self._source.read()
        if is_last and self._guard.failures():
            raise KeyProviderUnavailableError(
                "the token allows one more PIN only, and is not asked after a wrong one", hint=UNLOCK_HINT
            )
        with self._guard.attempt() as attempt:
            yield pin, attempt


class PinOutcome(enum.Enum):
    """Verdict of a token on a PIN."""

    RIGHT = enum.auto()
    WRONG = enum.auto()
    UNKNOWN = enum.auto()


class Attempt:
    """Outcome of one login.

    :ivar outcome: wrong until reported otherwise, so that every interrupted login counts.
    """

    def __init__(self) -> None:
        self.outcome = PinOutcome.WRONG

    def succeeded(self) -> None:
        """The token accepted the PIN."""
        self.outcome = PinOutcome.RIGHT

    def inconclusive(self) -> None:
        """The token failed before judging the PIN."""
        self.outcome = PinOutcome.UNKNOWN


def _write(descriptor: int, failures: int) -> None:
    try:
        os.pwrite(descriptor, f"{failures:<15}\n".encode(), 0)
        os.fsync(descriptor)
    except OSError as exc:
        raise ConfigError(f"cannot count wrong PINs: {exc.strerror}") from exc


def _once(read: Callable[[], bytes]) -> Callable[[], bytes]:
    kept: list[bytes] = []
    lock = threading.Lock()

    def kept_or_read() -> bytes:
        with lock:
            if not kept:
                kept.append(read())
            return kept[0]

    return kept_or_read


def _private_content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _require_private(path, os.fstat(descriptor))
        return os.read(descriptor, 4 * _LONGEST)
    finally:
        os.close(descriptor)


def _content(number: int) -> bytes:
    content = b""
    while piece := os.read(number, 4 * _LONGEST):
        content += piece
        if len(content) > 4 * _LONGEST:
            break
    return content


def _require_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()} who runs this",
            hint=f"chown {os.geteuid()} {path}",
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a file")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path} is open to other users (mode {status.st_mode & 0o777:04o})", hint=f"chmod 0600 {path}"
        )
