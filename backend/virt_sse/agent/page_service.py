"""The agent's part of the page: sockets, the confined process, and answers to its requests.

The agent listens, and starts the process at the first connection; the process ends when unused. The process
asks for the document with a byte, and gets the document: nothing that a browser sends reaches the agent.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from virt_sse.agent.logs import fields
from virt_sse.config import Config
from virt_sse.config.file import PageConfig
from virt_sse.errors import AgentError, ConfigError, VirtSseError
from virt_sse.page.access import provided_token
from virt_sse.page.document import Overview, Settings, encode
from virt_sse.system.extras import require
from virt_sse.system.files import SHARED_FOLDER, shared_folder

_log = logging.getLogger(__name__)

PAGE_ID = 65532
"""User and group of the process: outside of the ranges of distributions, systemd and ``storage-uids``."""
_MAIN = "from virt_sse.page.process import main; main()"
_BACKLOG = 64
_SHORTEST_SECONDS = 1.0
_SHARE = 10
"""The document is collected for at most one part in ten of the time."""
_SEND_SECONDS = 30.0
_PAUSE_SECONDS = 5.0
"""Time between the failure of a process and the next start."""


class Collector(Protocol):
    """Collects the document (:class:`~virt_sse.page.overview.OverviewCollector`)."""

    def collect(self) -> Overview:
        """The document as of now."""


class PageService:
    """Serves the page in a thread, between :meth:`start` and :meth:`stop`. Failures are logged.

    :param collector: makes the collector of the document, when somebody looks at the page first. The document
        is collected in the service's thread.
    """

    def __init__(self, config: Config, collector: Callable[[], Collector]) -> None:
        self._config = config
        self._make_collector = collector
        self._collector: Collector | None = None
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC)
        self._answer = b""
        self._next = 0.0

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End the process, if any, and serve no more."""
        os.write(self._wake, b"1")
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            require("page", "the page")
            with _listening(self._config) as (settings, sockets):
                names = [_name(each) for each in sockets]
                _log.info("page-listening", extra=fields({"at": names}))
                while self._is_wanted(sockets):
                    self._serve(settings, sockets)
        except VirtSseError as exc:
            details = {"reason": str(exc)} | ({"hint": exc.hint} if exc.hint else {})
            _log.warning("page-not-served", extra=fields(details))
        except Exception:  # noqa: BLE001 -- the page must not end the agent
            _log.exception("page-not-served")

    def _is_wanted(self, sockets: list[socket.socket]) -> bool:
        """Wait for a connection; false when the agent stops."""
        ready = _readable(self._woken, *(each.fileno() for each in sockets))
        return self._woken not in ready

    def _serve(self, settings: Settings, sockets: list[socket.socket]) -> None:
        """Run the process until its end or the agent's."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                descriptors = [theirs.fileno(), *(each.fileno() for each in sockets)]
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _MAIN, *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                )
            stopped = True
            try:
                ours.settimeout(_SEND_SECONDS)
                ours.sendall(encode(settings))
                stopped = self._answer_requests(ours)
            except OSError as exc:
                _log.warning("page-failed", extra=fields({"reason": exc.strerror or str(exc)}))
                stopped = False
            except Exception:  # noqa: BLE001 -- a fault while collecting must not end the page for good
                _log.exception("page-failed")
                self._pause()
            finally:
                ours.close()
                status = _ended(process, at_once=stopped)
        if status and not stopped:
            _log.warning("page-failed", extra=fields({"status": status}))
            self._pause()

    def _pause(self) -> None:
        """Wait before the next start, unless the agent stops."""
        waiting = select.poll()
        waiting.register(self._woken, select.POLLIN)
        waiting.poll(_PAUSE_SECONDS * 1000)

    def _answer_requests(self, channel: socket.socket) -> bool:
        """Answer requests until the process has ended: whether the agent stops."""
        while True:
            ready = _readable(channel.fileno(), self._woken)
            if self._woken in ready:
                return True
            if not channel.recv(1):
                return False
            channel.sendall(self._document())

    def _document(self) -> bytes:
        now = time.monotonic()
        if not self._answer or now >= self._next:
            self._collector = self._collector or self._make_collector()
            self._answer = encode(self._collector.collect())
            ended = time.monotonic()
            self._next = ended + max(_SHORTEST_SECONDS, _SHARE * (ended - now))
        return self._answer


def _readable(*descriptors: int) -> list[int]:
    """Wait until a descriptor can be read, or its peer has closed: all such descriptors."""
    waiting = select.poll()  # select(2) takes no descriptor above 1023
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in waiting.poll()]


def _ended(process: subprocess.Popen[bytes], *, at_once: bool) -> int:
    """Wait for the end of a process without a channel; kill the process *at_once*, or if need be."""
    if at_once:
        process.kill()
    try:
        return process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextlib.contextmanager
def _listening(config: Config) -> Iterator[tuple[Settings, list[socket.socket]]]:
    """The sockets of the page: the Unix socket first.

    :raise ConfigError: When the configured group does not exist, or the port cannot be used.
    :raise AgentError: When the Unix socket cannot be made, or the token cannot be read.
    """
    page = config.page
    group = _group(page)
    with contextlib.ExitStack() as opened:
        token = provided_token(config.page_token) if page.listen else None
        sockets = [opened.enter_context(_unix_socket(config.page_socket, group))]
        if page.listen:
            sockets.append(opened.enter_context(_loopback_socket(page)))
        is_root = os.geteuid() == 0
        yield (
            Settings(group=group, loopback=page.listen, token=token, user=PAGE_ID if is_root else None),
            sockets,
        )


def _group(page: PageConfig) -> int | None:
    if page.group is None:
        return None
    try:
        return grp.getgrnam(page.group).gr_gid
    except (KeyError, ValueError) as exc:
        raise ConfigError(f"no group {page.group[:80]!r}, 'group' in [page]") from exc


@contextlib.contextmanager
def _unix_socket(path: Path, group: int | None) -> Iterator[socket.socket]:
    """A listening socket for root and *group*; replaces the socket of a killed agent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        try:
            shared_folder(path.parent, SHARED_FOLDER)
            os.chown(path.parent, -1, group or os.getegid())
            path.parent.chmod(0o700 if group is None else 0o710)
            path.unlink(missing_ok=True)
            made.bind(str(path))
            os.chown(path, -1, group or os.getegid())
            path.chmod(0o600 if group is None else 0o660)
            made.listen(_BACKLOG)
        except OSError as exc:
            raise AgentError(f"cannot listen at {path}: {exc.strerror or exc}") from exc
        try:
            yield made
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _loopback_socket(page: PageConfig) -> Iterator[socket.socket]:
    host, port = page.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as made:
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen(_BACKLOG)
        except (OSError, OverflowError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise ConfigError(
                f"cannot listen at {page.listen}, 'listen' in [page]: {reason}",
                hint="choose another port, and restart the agent",
            ) from exc
        yield made


def _name(listener: socket.socket) -> str:
    address = listener.getsockname()
    return str(address) if isinstance(address, str) else f"{address[0]}:{address[1]}"
