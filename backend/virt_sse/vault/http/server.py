"""Serving a vault: TLS, background work, a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from virt_sse.audit.log import AuditLog
from virt_sse.errors import VaultError
from virt_sse.system.files import write_private
from virt_sse.vault import freshness, trail
from virt_sse.vault.home.certificates import needs_renewal, new_server_certificate
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import VaultSettings, url_of
from virt_sse.vault.http import connections
from virt_sse.vault.http.app import VaultApplication
from virt_sse.vault.http.connections import Acceptor, server_configuration
from virt_sse.vault.http.limits import Limits
from virt_sse.vault.http.log_limit import limited
from virt_sse.vault.identity.tokens import TOKEN_SECONDS
from virt_sse.vault.upkeep import upkeep
from virt_sse.vault.vault import Vault, open_vault

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_GRACE_SECONDS = 10
_FLUSH_SECONDS = 0.05
_UPKEEP_SECONDS = 30.0
_LIMITED_LOGGERS = ("uvicorn.error", trail.LOGGER, connections.LOGGER, freshness.LOGGER, __name__)
"""Strangers can cause lines of these loggers."""
DEFAULT_HOST = "127.0.0.1"


def serve(
    path: Path,
    *,
    host: str = DEFAULT_HOST,
    port: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 -- frozen
    token_seconds: int = TOKEN_SECONDS,
    shortest_rotation: int | None = None,
    upkeep_seconds: float = _UPKEEP_SECONDS,
    listening: Callable[[str], None] = lambda _url: None,
) -> None:
    """Serve the vault in *path* until SIGTERM or SIGINT.

    :param port: by default the port in the vault's URL.
    :param token_seconds: lifetime of access tokens.
    :param shortest_rotation: the shortest interval in a rotation policy, in seconds; default Azure's 7 days.
    :param upkeep_seconds: interval of checks for due rotations and purges.
    :param listening: called with the URL once the server accepts requests.
    :raise VaultError: When there is no vault, its files are open to others, another process serves the vault,
        or the address cannot be used.
    """
    directory = VaultDirectory(path)
    with open_vault(
        directory,
        AuditLog(directory.audit_path),
        token_seconds=token_seconds,
        shortest_rotation=shortest_rotation,
    ) as vault:
        _renew_certificate(directory, vault.settings)
        listener = _listen(host, vault.settings.port if port is None else port)
        with listener, contextlib.closing(VaultApplication(vault, limits)) as application:
            _allow_many_connections()
            config = _configuration(directory, application, limits)
            server = _Server(config, application, listening, listener, limits)
            with limited(_LIMITED_LOGGERS):
                asyncio.run(_run(server, listener, directory, vault, upkeep_seconds))


class _Server(uvicorn.Server):
    """uvicorn, with limits of connections, a callback once it listens, and a clean exit after a signal."""

    def __init__(
        self,
        config: uvicorn.Config,
        application: VaultApplication,
        listening: Callable[[str], None],
        listener: socket.socket,
        limits: Limits,
    ) -> None:
        super().__init__(config)
        self._limits = limits
        self._acceptor: Acceptor | None = None
        self.application = application
        self._listening = listening
        self._listener = listener

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections; in place of uvicorn's own servers, which have no limits."""
        asyncio.get_running_loop().set_exception_handler(_log_once)
        self.servers = []
        self._acceptor = Acceptor(self._listener, self._limits, self.config, self.server_state)
        self._acceptor.start()
        self.started = True
        host, port = self._listener.getsockname()[:2]
        self._listening(url_of(host, port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish running requests, refuse new requests, and close connections without waiting for clients."""
        self.application.limiter.close()
        if self._acceptor is not None:
            self._acceptor.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                await self.application.limiter.idle()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(_FLUSH_SECONDS)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        self.should_exit = True


def _log_once(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log an error outside of a request, at most once a minute."""
    exc = context.get("exception")
    _log.error(
        "the vault's server failed: %s: %r",
        *(context.get("message"), exc),
        exc_info=exc if isinstance(exc, BaseException) else None,
    )


async def _run(
    server: _Server, listener: socket.socket, directory: VaultDirectory, vault: Vault, upkeep_seconds: float
) -> None:
    task = asyncio.create_task(_keep_up(server, directory, vault, upkeep_seconds))
    try:
        await server.serve(sockets=[listener])
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _keep_up(server: _Server, directory: VaultDirectory, vault: Vault, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(upkeep, vault, server.application.trail)
            if _renew_certificate(directory, vault.settings) and server.config.ssl:
                server.config.ssl.load_cert_chain(directory.server_path)
        except Exception:  # noqa: BLE001 -- retried later; requests must go on meanwhile
            _log.exception("the vault's upkeep failed")


def _renew_certificate(directory: VaultDirectory, settings: VaultSettings) -> bool:
    if not needs_renewal(directory.server_path.read_bytes()):
        return False
    ca, ca_key = directory.ca_path.read_bytes(), directory.ca_key_path.read_bytes()
    write_private(directory.server_path, new_server_certificate(ca, ca_key, settings.hosts))
    return True


def _configuration(
    directory: VaultDirectory, application: VaultApplication, limits: Limits
) -> uvicorn.Config:
    return server_configuration(
        application.limiter,
        limits,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ssl_certfile=directory.server_path,
        ssl_keyfile=directory.server_path,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # Not socket.create_server: without the protocol's number asyncio leaves Nagle's algorithm on.
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as exc:
        raise _cannot_listen(host, port, exc) from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise _cannot_listen(host, port, exc) from exc
    return listener


def _cannot_listen(host: str, port: int, exc: Exception) -> VaultError:
    reason = " ".join(str(getattr(exc, "strerror", None) or exc).split())
    return VaultError(f"cannot listen on {host} port {port}: {reason}")


def _allow_many_connections() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
