"""Standard streams of a command: closed descriptors, full disks and closed pipes."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator

from virt_sse.errors import OutputError


class _StandardOutput(io.TextIOWrapper):
    """Standard output whose failures are :class:`OutputError`. A closed pipe stays a ``BrokenPipeError``."""

    def write(self, text: str, /) -> int:
        with _failure_named():
            return super().write(text)

    def flush(self) -> None:
        with _failure_named():
            super().flush()


@contextlib.contextmanager
def _failure_named() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        _discard_output()
        if exc.errno == errno.EPIPE:
            raise
        raise OutputError(f"cannot write to standard output: {exc.strerror}") from exc


def _discard_output() -> None:
    """Send buffered output nowhere: the interpreter flushes again at its end, and would report a failure."""
    _redirect_to_null(1)


def _discard_errors() -> None:
    """Send error text which cannot be written nowhere, for the same reason."""
    try:
        sys.stderr.flush()
    except OSError:
        _redirect_to_null(2)


def _redirect_to_null(standard: int) -> None:
    descriptor = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(descriptor, standard)
    os.close(descriptor)


def prepare() -> None:
    """Open closed standard descriptors, and name failures of standard output.

    Otherwise the next opened file, e.g. the store, would get the descriptor 1 or 2, and child processes would
    write into this file. A write to a closed standard output fails, as with other tools.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            flags = os.O_WRONLY if descriptor == 2 else os.O_RDONLY
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free descriptor
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 -- a stream of the whole process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 -- likewise
    atexit.register(_discard_errors)
    if sys.stdout is None:
        sys.stdout = _StandardOutput(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    elif isinstance(sys.stdout, io.TextIOWrapper):
        stdout = sys.stdout
        sys.stdout = _StandardOutput(stdout.buffer, stdout.encoding, stdout.errors)


def restrict_umask() -> None:
    """Let no child process make files that other users may write, whatever the caller's umask."""
    os.umask(os.umask(0o022) | 0o022)
