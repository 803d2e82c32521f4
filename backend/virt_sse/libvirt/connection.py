"""Connections to libvirt, with libvirt's errors raised as errors of virt-sse."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import libvirt

from virt_sse.errors import LibvirtError, LibvirtSilentError, LibvirtUnavailableError

_OPEN_SECONDS = 5.0
"""Time limit for opening a connection. libvirt itself has none, and libvirtd answers in milliseconds."""
_AGAIN_SECONDS = 1.0
"""The same, while an earlier attempt of this process is still without an answer."""

_lock = threading.Lock()
_silent: dict[str, threading.Thread] = {}
"""By URI, the attempt without an answer; also the bound on threads that wait for a hung libvirtd."""


@contextlib.contextmanager
def connected(uri: str) -> Iterator[libvirt.virConnect]:
    """Connect to the libvirt at *uri*; the connection is closed at the end of the block.

    :raise LibvirtSilentError: When libvirt accepts the connection and does not answer in time, as while
        libvirtd starts autostarted domains.
    :raise LibvirtUnavailableError: When libvirt does not answer.
    :raise LibvirtError: When a libvirt call in the block fails and the block does not catch the error.
    """
    libvirt.registerErrorHandler(_print_nothing, None)
    try:
        connection = _open(uri)
    except libvirt.libvirtError as exc:
        raise LibvirtUnavailableError(f"libvirt does not answer at {uri}: {exc}") from exc
    except ValueError as exc:  # not UTF-8, or with a zero byte
        raise LibvirtUnavailableError(f"invalid libvirt URI {ascii(uri)[:200]}") from exc
    try:
        yield connection
    except libvirt.libvirtError as exc:
        raise LibvirtError(f"libvirt: {exc}") from exc
    finally:
        connection.close()


def _open(uri: str) -> libvirt.virConnect:
    """Open a connection within the time limit.

    :raise LibvirtSilentError: When the limit is over. The attempt goes on in its thread, and a connection
        opened late is closed.
    :raise libvirt.libvirtError: When libvirt refuses.
    :raise ValueError: When *uri* cannot be passed to libvirt.
    """
    _await_earlier_attempt(uri)
    answer: queue.SimpleQueue[libvirt.virConnect | Exception] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answer.put(libvirt.open(uri))
        except (libvirt.libvirtError, ValueError) as exc:
            answer.put(exc)

    thread = threading.Thread(target=attempt, name="libvirt-open", daemon=True)
    thread.start()
    try:
        opened = answer.get(timeout=_OPEN_SECONDS)
    except queue.Empty:
        with _lock:
            _silent[uri] = thread
        raise _silence(uri, _OPEN_SECONDS) from None
    if isinstance(opened, Exception):
        raise opened
    return opened


def _await_earlier_attempt(uri: str) -> None:
    """Fail early while an earlier attempt is still without an answer.

    :raise LibvirtSilentError: When the earlier attempt stays without an answer.
    """
    with _lock:
        earlier = _silent.get(uri)
    if earlier is None:
        return
    earlier.join(_AGAIN_SECONDS)
    if earlier.is_alive():
        raise _silence(uri, _AGAIN_SECONDS)
    with _lock:
        if _silent.get(uri) is earlier:
            del _silent[uri]


def _silence(uri: str, seconds: float) -> LibvirtSilentError:
    return LibvirtSilentError(
        f"libvirt at {uri} does not answer within {seconds:g} s",
        hint="libvirtd answers no client while it starts autostarted domains; the agent starts these domains "
        "once libvirtd answers",
    )


def _print_nothing(_context: object, _error: object) -> None:
    """Replaces libvirt's default handler, which prints every error, raised or not, to standard error."""
