"""Connections of clients: how many, and how long each may stay silent.

Each TLS connection costs a descriptor and about 350 KiB, and strangers can open connections. Limits therefore
apply from ``accept`` on: a limit in total and per client address, and time limits for the TLS handshake, for
a request to arrive and for a response to be taken. At a limit, the connection waiting longest for its client
is closed, and the new connection is served: silent connections cannot keep others out.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import math
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from virt_sse.vault.http.limits import Limits

_log = logging.getLogger(__name__)

LOGGER = _log.name

RESERVED_DESCRIPTORS = 128
"""Kept for the database, the audit log, the HSM's process and the certificate."""

_STALLED_SECONDS = 30.0
"""How long a client may leave a response unread."""

_HEADERS_LIMIT = 16 << 10
_CLOSING_SECONDS = 5.0
_ACCEPT_RETRY_SECONDS = 1.0
_ACCEPTS_AT_ONCE = 8
"""Few: asyncio closes a connection some rounds of the event loop after the decision."""

_NO_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_IPV6_CLIENT_PREFIX = 64


@dataclass(eq=False, slots=True)
class _Slot:
    """An accepted connection.

    :ivar address: the client, as counted: an IPv4 address or an IPv6 network.
    :ivar since: when the present wait for the client began; the loop's time. Data that do not complete a
        request do not change it.
    :ivar release: gives the slot back; may be called repeatedly.
    :ivar begun: whether asyncio owns the socket.
    """

    socket: socket.socket
    address: str
    since: float
    release: Callable[[], None]
    begun: bool = False
    task: asyncio.Task[None] | None = field(default=None)
    connection: BoundedConnection | None = field(default=None)

    @property
    def waiting(self) -> bool:
        """Whether the server waits for the client: for the handshake or for the rest of a request."""
        return self.connection is None or self.connection.waiting

    def close(self) -> None:
        """Close the connection at once."""
        if self.connection is not None:
            self.connection.transport.abort()
        elif self.task is not None:
            self.task.cancel()
            if not self.begun:  # a task cancelled before its start does nothing, not even close the socket
                self.socket.close()
        self.release()


class _Timer:
    """A call at a later time, if not stopped before."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._seconds = seconds
        self._call = call
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to wait, unless the timer runs already."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._fire)

    def stop(self) -> None:
        """Drop the call."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._call()


class BoundedConnection(H11Protocol):
    """HTTP/1.1 by h11, which bounds the headers, with time limits."""

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, slot: _Slot, request_seconds: float
    ) -> None:
        super().__init__(config, server_state, {})
        self._slot = slot
        self._request_timer = _Timer(request_seconds, self._abort)
        self._stalled_timer = _Timer(_STALLED_SECONDS, self._abort)

    @property
    def waiting(self) -> bool:
        """Whether the server waits for a request, or for the rest of a request's body."""
        return self._between_requests or self.cycle.more_body

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        super().connection_made(transport)
        self._slot.connection = self
        self._request_timer.start()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn forgets this timer if exc is not None
        self._request_timer.stop()
        self._stalled_timer.stop()
        self._slot.release()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._between_requests:  # an incomplete request, or a body that nobody reads
            self._request_timer.start()

    def handle_events(self) -> None:
        super().handle_events()
        if not self._between_requests:
            self._request_timer.stop()

    def on_response_complete(self) -> None:
        self._slot.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_timer.start()

    def resume_writing(self) -> None:
        self._stalled_timer.stop()
        super().resume_writing()

    def _abort(self) -> None:
        self.transport.abort()


class Acceptor:
    """Accepts connections within the limits. For the event loop's thread only.

    asyncio's own server accepts without limits, and logs a traceback at each attempt without descriptors.

    :param listener: a listening socket; remains the caller's.
    :param client: names the client of a new connection, for counting; ``None`` refuses the connection. By
        default, the client's network address.
    """

    def __init__(
        self,
        listener: socket.socket,
        limits: Limits,
        config: uvicorn.Config,
        server_state: ServerState,
        *,
        client: Callable[[socket.socket, Any], str | None] | None = None,
    ) -> None:
        self._listener = listener
        self._limits = limits
        self._config = config
        self._server_state = server_state
        self._total = most_connections(limits.connections)
        self._slots: dict[str, set[_Slot]] = {}
        self._client = client or _network_client
        self._count = 0
        self._retry = _Timer(_ACCEPT_RETRY_SECONDS, self.start)
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to accept connections."""
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more connections, and end unfinished TLS handshakes."""
        self._loop.remove_reader(self._listener.fileno())
        self._retry.stop()
        for slot in [slot for slots in self._slots.values() for slot in slots]:
            if slot.connection is None:
                slot.close()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _NO_RESOURCES:
                    return  # an error of the new connection, accept(2)
                _log.error("cannot accept connections now: %s", exc.strerror)
                self._loop.remove_reader(self._listener.fileno())
                self._retry.start()
                return
            self._admit(connection, self._client(connection, address))

    def _admit(self, connection: socket.socket, address: str | None) -> None:
        if address is None or not self._make_room(address):
            connection.close()
            return
        slot = _Slot(connection, address, self._loop.time(), lambda: self._release(slot))
        self._slots.setdefault(address, set()).add(slot)
        self._count += 1
        slot.task = self._loop.create_task(self._establish(slot))

    def _make_room(self, address: str) -> bool:
        """Close a connection if a limit is reached; return whether another connection may be served."""
        own = self._slots.get(address, set())
        if len(own) >= self._limits.connections_per_address:
            found = [slot for slot in own if slot.waiting]
        elif self._count >= self._total:
            crowded = sorted(self._slots.values(), key=len, reverse=True)
            found = next((w for slots in crowded if (w := [s for s in slots if s.waiting])), [])
        else:
            return True
        if not found:
            _log.warning("too many connections: refused a connection from %s", address)
            return False
        longest = min(found, key=lambda slot: slot.since)
        _log.warning("too many connections: closed a waiting connection from %s", longest.address)
        longest.close()
        return True

    async def _establish(self, slot: _Slot) -> None:
        slot.begun = True
        try:
            await self._loop.connect_accepted_socket(
                lambda: BoundedConnection(
                    self._config, self._server_state, slot, request_seconds=self._limits.request_seconds
                ),
                slot.socket,
                ssl=self._config.ssl,
                ssl_handshake_timeout=self._limits.request_seconds if self._config.ssl else None,
                ssl_shutdown_timeout=_CLOSING_SECONDS if self._config.ssl else None,
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError is an OSError; asyncio closes the socket
            slot.release()
        except BaseException:
            slot.release()
            raise

    def _release(self, slot: _Slot) -> None:
        slots = self._slots.get(slot.address, set())
        if slot in slots:
            slots.remove(slot)
            self._count -= 1
            if not slots:
                del self._slots[slot.address]


def most_connections(wanted: int) -> int:
    """Compute the limit of connections: *wanted*, unless the process may open too few descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, max(soft - RESERVED_DESCRIPTORS, soft // 4)))


def _network_client(_connection: socket.socket, address: tuple[object, ...]) -> str:
    return _client(str(address[0]))


def _client(address: str) -> str:
    """Name the client for counting: an IPv6 client has a whole network of addresses."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _IPV6_CLIENT_PREFIX), strict=False))


def server_configuration(app: ASGIApp, limits: Limits, **more: Any) -> uvicorn.Config:
    """Settings of a server for strangers: bounded headers, no WebSockets, and nothing told about itself.

    :param more: further settings of uvicorn.
    """
    return uvicorn.Config(
        app,
        http=BoundedConnection,  # never httptools, which does not bound the headers
        h11_max_incomplete_event_size=_HEADERS_LIMIT,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(limits.idle_seconds),
        **more,
    )
