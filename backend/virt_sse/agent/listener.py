"""The agent's socket: passed by systemd or created, and locked against a second agent."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from virt_sse.errors import AgentError
from virt_sse.system.files import PRIVATE_FILE, private_folder

_FIRST_PASSED = 3
"""``SD_LISTEN_FDS_START`` (sd_listen_fds(3))."""

_BACKLOG = 128


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket at *path*, in a 0700 folder; replaces the socket of a killed agent.

    A socket passed by the service manager has priority; the service manager removes its own socket.

    :raise AgentError: When another agent has the socket, or the socket cannot be created.
    """
    passed = _passed()
    try:
        private_folder(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as exc:
        raise AgentError(f"cannot create {path.parent}: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise AgentError(f"another agent serves {path}", hint="virt-sse agent status") from exc
        if passed:
            with passed:
                yield passed
            return
        with _made(path) as made:
            try:
                yield made
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _passed() -> socket.socket | None:
    """The socket passed by systemd, if any (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    passed = socket.socket(fileno=_FIRST_PASSED)
    os.set_inheritable(passed.fileno(), False)
    if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM:
        raise AgentError("the service manager has passed a descriptor that is not a Unix stream socket")
    return passed


def _made(path: Path) -> socket.socket:
    _refuse_if_answered(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        made.bind(str(path))
        path.chmod(PRIVATE_FILE)
        made.listen(_BACKLOG)
    except OSError as exc:
        made.close()
        raise AgentError(f"cannot listen at {path}: {exc.strerror or exc}") from exc
    return made


def _refuse_if_answered(path: Path) -> None:
    """A running agent has the lock, but systemd may listen at *path* before the agent runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(str(path))
        raise AgentError(
            f"another process already listens at {path}",
            hint="if virt-sse-agent.socket is enabled, run 'systemctl start virt-sse-agent'",
        )
