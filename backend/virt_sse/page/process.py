"""The page's process: speaks HTTP with browsers, and knows nothing but the document of the page.

Before the first request is read, the process gives up root, all capabilities, the network beside the sockets
passed to it, all files but system libraries (Landlock), and the system calls that no such process needs
(:mod:`virt_sse.stages.seccomp`). All code is imported, and every page rendered once, before.

The arguments are descriptors: the agent's channel, the Unix socket, and the loopback socket if any.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from virt_sse.agent_client import peer_user
from virt_sse.errors import ToolError
from virt_sse.page.access import Sessions
from virt_sse.page.application import DocumentUnavailableError, application, warm_up
from virt_sse.page.document import Overview, Settings, decode
from virt_sse.stages.launch import LANDLOCK_RESTRICT_SELF, landlock, put_under_filter
from virt_sse.stages.seccomp import stage_filter
from virt_sse.system.process_hardening import protect_memory
from virt_sse.vault.http.connections import Acceptor, server_configuration
from virt_sse.vault.http.limits import Limits

_log = logging.getLogger(__name__)

_LIMITS = Limits(connections=64, connections_per_address=32, idle_seconds=60.0)
_AGENT_USER = os.geteuid()
"""The user that starts this process."""
_LONGEST_DOCUMENT = 256 << 20
_MOST_MEMORY = 2 << 30
_MOST_FILES = 256
_FRESH_SECONDS = 1.0
_ANSWER_SECONDS = 20.0
_UNUSED_SECONDS = 300.0
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_CAPABILITIES = range(64)
_SO_PEERGROUPS = 59
_MOST_GROUPS = 65536
_LENGTH_BYTES = 4
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Serve the page until the agent ends or stops, or until nobody has looked for minutes."""
    logging.basicConfig(format="virt-sse: page: %(message)s", level=logging.WARNING)
    channel_number, *numbers = map(int, sys.argv[1:])
    protect_memory()
    channel = socket.socket(fileno=channel_number)
    settings = decode(_received(channel), Settings)
    listeners = [socket.socket(fileno=number) for number in numbers]
    asyncio.run(_serve(channel, listeners, settings))


def _received(channel: socket.socket) -> bytes:
    with channel.makefile("rb", buffering=0) as file:
        content = b""
        length = None
        while length is None or len(content) < length:
            part = file.read((_LENGTH_BYTES if length is None else length) - len(content))
            if not part:
                raise SystemExit("the agent has ended")
            content += part
            if length is None and len(content) == _LENGTH_BYTES:
                length, content = int.from_bytes(content, "big"), b""
        return content


async def _serve(channel: socket.socket, listeners: list[socket.socket], settings: Settings) -> None:
    documents = Documents(channel)
    apps: list[ASGIApp] = [application(documents.newest, None)]
    if settings.token and len(listeners) > 1:
        apps.append(application(documents.newest, Sessions(settings.token)))
    for app in apps:
        await warm_up(app)
    configs = [server_configuration(app, _LIMITS) for app in apps]
    for config in configs:
        config.load()
    server = _Server(configs, listeners, settings, documents)
    await documents.open()
    confine(settings.user)
    await server.serve()


def confine(user: int | None) -> None:
    """Give up all rights that the process does not need, for the rest of its life.

    :param user: user and group to become; ``None`` to stay the same user.
    :raise OSError: When the kernel refuses.
    """
    libc = _LIBC
    try:
        program = stage_filter()
    except ToolError:
        program = None  # libseccomp is not installed; stage processes run without the filter as well
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST_FILES, _MOST_FILES))
    ruleset = landlock(libc, [], [])
    if os.geteuid() == 0 and user is not None:
        libc.unshare(_CLONE_NEWNET)  # refused in some containers; then the filter alone denies the network
        libc.unshare(_CLONE_NEWIPC)
        for capability in _CAPABILITIES:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        protect_memory()  # setresuid(2) may reset the attribute
    parent = os.getppid()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent != os.getppid():
        raise SystemExit("the agent has ended")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the right to new privileges")
    if ruleset is not None and libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot restrict the process by Landlock")
    if program is not None:
        put_under_filter(libc, program)


class Documents:
    """The newest document, asked of the agent when somebody looks."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = asyncio.Lock()
        self._newest: Overview | None = None
        self._at = 0.0
        self.used = time.monotonic()
        self.ended = asyncio.Event()

    async def open(self) -> None:
        """Begin to read from the agent."""
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._channel, limit=_LONGEST_DOCUMENT
        )

    async def newest(self) -> Overview:
        """The newest document.

        :raise DocumentUnavailableError: When the agent does not answer in time, and there is no older one.
        """
        self.used = time.monotonic()
        async with self._lock:
            if self._newest is None or time.monotonic() - self._at > _FRESH_SECONDS:
                try:
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        self._newest = await self._asked()
                    self._at = time.monotonic()
                except (TimeoutError, OSError, asyncio.IncompleteReadError) as exc:
                    self.ended.set()  # an answer that comes late would be taken for the next one
                    raise DocumentUnavailableError("the agent does not answer") from exc
            return self._newest

    async def _asked(self) -> Overview:
        self._writer.write(b"?")
        await self._writer.drain()
        length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
        if length > _LONGEST_DOCUMENT:
            raise OSError("the document is too long")
        return decode(await self._reader.readexactly(length), Overview)

    async def watch(self) -> None:
        """Return when the agent has ended, or nobody has looked for a while."""
        while time.monotonic() - self.used < _UNUSED_SECONDS and not self._reader.at_eof():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.ended.wait()
                    return


class _Server(uvicorn.Server):
    """uvicorn, with limits of connections, on several sockets."""

    def __init__(
        self,
        configs: list[uvicorn.Config],
        listeners: list[socket.socket],
        settings: Settings,
        documents: Documents,
    ) -> None:
        super().__init__(configs[0])
        self._parts = list(zip(configs, listeners, strict=False))
        self._group = settings.group
        self._documents = documents
        self._acceptors: list[Acceptor] = []
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections within the limits."""
        self.servers = []
        names: list[Callable[[socket.socket, Any], str | None] | None] = [self._client, None]
        for (config, listener), name in zip(self._parts, names, strict=False):
            acceptor = Acceptor(listener, _LIMITS, config, self.server_state, client=name)
            acceptor.start()
            self._acceptors.append(acceptor)
        self._watch = asyncio.create_task(self._documents.watch())
        self._watch.add_done_callback(lambda _: setattr(self, "should_exit", True))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end all connections."""
        for acceptor in self._acceptors:
            acceptor.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self._watch is not None:
            self._watch.cancel()

    def _client(self, connection: socket.socket, _address: object) -> str | None:
        """The peer's user; ``None`` unless root, the process's own user's or of the configured group."""
        return str(peer_user(connection)) if is_admitted(connection, self._group) else None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def is_admitted(connection: socket.socket, group: int | None) -> bool:
    """Whether the peer of a Unix socket is root, the agent's user or a member of *group*."""
    if peer_user(connection) in (0, _AGENT_USER):
        return True
    if group is None:
        return False
    size = struct.calcsize("3i")
    _, _, own = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return group in (own, *_groups(connection))


def _groups(connection: socket.socket) -> list[int]:
    """The peer's supplementary groups, none if the kernel does not tell (socket(7), ``SO_PEERGROUPS``).

    Python's own ``getsockopt`` returns at most 1024 bytes.
    """
    groups = (ctypes.c_uint32 * _MOST_GROUPS)()
    length = ctypes.c_uint32(ctypes.sizeof(groups))
    given = (socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(length))
    if _LIBC.getsockopt(connection.fileno(), *given) != 0:
        return []
    return groups[: length.value // ctypes.sizeof(ctypes.c_uint32)]
