"""PINs: their sources, and the lock-out after wrong PINs."""

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

UNLOCK_HINT = (
    "correct the PIN, then run 'virt-sse host hsm unlock', or 'vault hsm unlock' for a vault's token"
)

MOST_WRONG = 3
"""Number of wrong PINs in a row before lock-out."""

_LONGEST = 255
"""Maximum length in bytes accepted by PKCS#11 modules."""


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """A PIN. Cannot be printed or pickled."""

    text: str = field(repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PIN cannot be pickled")


class PinSource:
    """Source of a PIN: a file, an open descriptor or a prompt, never an argument or the environment."""

    def __init__(self, description: str, read: Callable[[], bytes]) -> None:
        self._description = description
        self._read = read

    def __repr__(self) -> str:
        return f"PinSource({self._description})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the source of a PIN cannot be pickled")

    @classmethod
    def file(cls, path: Path) -> Self:
        """First line of the file *path*, read at each use; only its owner may have access."""
        return cls(str(path), lambda: _private_content(path))

    @classmethod
    def descriptor(cls, number: int) -> Self:
        """First line from an open descriptor, read to its end once, at the first use."""
        return cls(f"descriptor {number}", _once(lambda: _content(number)))

    @classmethod
    def prompt(cls, ask: Callable[[], str]) -> Self:
        """Result of *ask*, called once, at the first use."""
        return cls("prompt", _once(lambda: ask().encode()))

    def read(self) -> Pin:
        """Read the PIN.

        :raise ConfigError: When there is no PIN, or other users have access to its file.
        """
        try:
            text = self._read().split(b"\n", 1)[0].removesuffix(b"\r").decode("utf-8")
        except OSError as exc:
            raise ConfigError(f"cannot read the PIN ({self._description}): {exc.strerror}") from exc
        except UnicodeDecodeError:  # its message would show the bytes
            raise ConfigError(f"the PIN is not UTF-8 ({self._description})") from None
        if not text or len(text.encode()) > _LONGEST or "\0" in text:
            raise ConfigError(f"the PIN must have 1 to {_LONGEST} bytes ({self._description})")
        return Pin(text)


class PinGuard:
    """Counts wrong PINs in a file, across threads, processes and restarts, and refuses after too many.

    This gives a lock-out to tokens without their own, such as SoftHSM. A token with its own lock-out is never
    locked by a wrong PIN in a file, because logins stop earlier. An attempt is counted before the login, and
    uncounted when the PIN was right: ``kill -9`` in between does not help a guesser.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"PinGuard({self._path})"

    def failures(self) -> int:
        """Number of failed attempts in a row.

        :raise ConfigError: When the file cannot be read.
        """
        if not self._path.exists():
            return 0
        with self._open() as descriptor:
            return self._failures(descriptor)

    def reset(self) -> None:
        """Reset the count, on an administrator's request.

        :raise ConfigError: When the file cannot be written.
        """
        with self._open() as descriptor:
            _write(descriptor, 0)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Context of one login, exclusive among all processes.

        The login counts as failed unless the caller reports another outcome.

        :raise KeyProviderUnavailableError: When there were too many wrong PINs; do not log in.
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
        if not text:  # new file
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
    """Provides the PIN for one login at a time."""

    def attempt(self, *, is_last: bool) -> AbstractContextManager[tuple[Pin, Attempt]]:
        """Context of one login: the PIN, and the attempt to report the outcome to.

        :param is_last: whether the token would lock itself after one more wrong PIN.
        :raise KeyProviderUnavailableError: When a login is not allowed: after a wrong PIN if *is_last*, or as
            in
            :meth:`PinGuard.attempt`.
        :raise ConfigError: When there is no PIN, or its use cannot be counted.
        """


class GuardedPin:
    """Logins with the PIN of a source, guarded by a count of wrong PINs."""

    def __init__(self, source: PinSource, guard: PinGuard) -> None:
        self._source = source
        self._guard = guard

    @contextlib.contextmanager
    def attempt(self, *, is_last: bool) -> Iterator[tuple[Pin, Attempt]]:
        pin = self._source.read()
        if is_last and self._guard.failures():
            raise KeyProviderUnavailableError(
                "the token allows only one more attempt, and the last PIN was wrong", hint=UNLOCK_HINT
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
            f"{path} belongs to user {status.st_uid}, not to the current user {os.geteuid()}",
            hint=f"chown {os.geteuid()} {path}",
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a file")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path} is accessible to other users (mode {status.st_mode & 0o777:04o})",
            hint=f"chmod 0600 {path}",
        )
