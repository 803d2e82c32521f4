"""The agent's socket: taken over from systemd, or made, and then held by this agent alone."""

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
    """A listening socket at *path*, in a folder that is 0700; one that a killed agent left is replaced.

    One that the service manager has passed is used instead, and is the manager's to remove.

    :raise AgentError: When another agent has it, or it cannot be made.
    """
    passed = _passed()
    try:
        private_folder(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    except OSError as exc:
        raise AgentError(f"cannot make {path.parent}: {exc.strerror}") from exc
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
    """The socket that systemd listens on for us, if it does (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    passed = socket.socket(fileno=_FIRST_PASSED)
    os.set_inheritable(passed.fileno(), False)
    if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM:
        raise AgentError("the service manager has passed something else than a Unix stream socket")
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
    """Another agent would have our lock, but systemd may listen there on one's behalf."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial, contextlib.suppress(OSError):
        trial.settimeout(1)
        trial.connect(str(path))
        raise AgentError(
            f"something listens at {path} already",
            hint="where virt-sse-agent.socket is enabled, 'systemctl start virt-sse-agent' starts the agent",
        )
