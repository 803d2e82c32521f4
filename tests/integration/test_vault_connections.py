"""Strangers at a served vault: silent, slow and numerous connections keep nobody out and fill no log."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.command_line import PROGRAM
from support.vault_tools import Raw
from support.waiting import wait_until
from virt_sse.lab.vaults import LabVault
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.http.connections import RESERVED_DESCRIPTORS
from virt_sse.vault_client.credential import VaultCredential

REQUEST_SECONDS = 1.0
LONGEST_LOG = 16 << 10
CLOSED = "reset|[Bb]roken pipe|EOF"


@contextmanager
def served(*arguments: str) -> Iterator[LabVault]:
    with LabVault(arguments=("--request-seconds", str(REQUEST_SECONDS), *arguments)) as vault:
        yield vault


def dial(vault: LabVault) -> socket.socket:
    """A TCP connection without TLS."""
    return socket.create_connection(("127.0.0.1", int(urlsplit(vault.url).port or 0)), timeout=10)


def tls(vault: LabVault) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=vault.ca_path)
    return context.wrap_socket(dial(vault), server_hostname="localhost")


def status_of(vault: LabVault, token: str) -> int:
    with Raw(vault, token) as raw:
        return raw("GET", "/keys").status


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            assert time.monotonic() - began < 10
    return time.monotonic() - began


def trickle(connection: socket.socket, data: bytes, seconds: float) -> int:
    """Send *data* again and again until the vault closes the connection; return the number of bytes sent."""
    sent = 0
    for _ in range(100_000):
        sent += connection.send(data)
        time.sleep(seconds)
    return sent


def token_request(vault: LabVault) -> bytes:
    """The headers of a token request whose body does not follow."""
    path = urlsplit(VaultDirectory(vault.directory).settings().token_endpoint).path
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n".encode()


@pytest.mark.slow
def test_token_requests_without_a_body_block_nobody() -> None:
    with served("--concurrency", "4") as vault, ExitStack() as stack:
        token, request = VaultCredential(vault.administrator_path).token(), token_request(vault)
        for _ in range(16):
            stack.enter_context(tls(vault)).sendall(request)
        time.sleep(0.3)
        assert [status_of(vault, token) for _ in range(10)] == [200] * 10


@pytest.mark.slow
def test_silent_and_trickling_connections_are_closed() -> None:
    with served("--idle-seconds", "2") as vault:
        with dial(vault) as without_tls, tls(vault) as silent, tls(vault) as begun, tls(vault) as between:
            begun.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
            between.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            began = time.monotonic()
            for connection in (without_tls, silent, begun, between):
                seconds_until_closed(connection)
            assert time.monotonic() - began < 5
        with tls(vault) as trickling:
            began = time.monotonic()
            with pytest.raises(OSError, match=CLOSED):
                trickle(trickling, b"a", 0.1)
            assert time.monotonic() - began < 3
        with tls(vault) as unread:  # a refused request whose body trickles in
            unread.sendall(b"POST /keys/a/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
            began = time.monotonic()
            with pytest.raises(OSError, match=CLOSED):
                trickle(unread, b"a", 0.1)
            assert time.monotonic() - began < 3
        assert vault.log_path.read_text() == ""


@pytest.mark.slow
def test_a_connection_in_use_is_not_closed() -> None:
    with served() as vault, Raw(vault, VaultCredential(vault.administrator_path).token()) as raw:
        began = time.monotonic()
        before = None
        while time.monotonic() - began < 2.5 * REQUEST_SECONDS:
            assert raw("GET", "/keys").status == 200
            assert before in (None, raw.connection.sock)  # the same connection
            before = raw.connection.sock
            time.sleep(0.3)
        time.sleep(1.5 * REQUEST_SECONDS)  # silent between two requests, for less than the idle time
        assert raw("GET", "/keys").status == 200
        assert raw.connection.sock is before


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["--connections", "--connections-per-address"])
def test_beyond_the_limit_the_connection_waiting_longest_ends(limit: str) -> None:
    with (
        LabVault(arguments=(limit, "8", "--request-seconds", "30")) as vault,
        ExitStack() as stack,
    ):
        token = VaultCredential(vault.administrator_path).token()
        first = stack.enter_context(tls(vault))
        for _ in range(20):
            stack.enter_context(dial(vault))
        assert seconds_until_closed(first) < 5
        assert status_of(vault, token) == 200
        log = vault.log_path.read_text()
        assert "closed a waiting connection from 127.0.0.1" in log
        assert len(log.splitlines()) == 1


@pytest.mark.slow
def test_at_the_descriptor_limit_a_vault_goes_on_and_logs_a_line() -> None:
    with LabVault(arguments=("--request-seconds", "30")) as vault, ExitStack() as stack:
        token = VaultCredential(vault.administrator_path).token()
        # Below the limit that the vault found when it started: accept fails.
        hard = resource.prlimit(vault.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(vault.pid, resource.RLIMIT_NOFILE, (64, hard))
        idle = [stack.enter_context(dial(vault)) for _ in range(150)]
        time.sleep(3)
        log = vault.log_path.read_text()
        assert "cannot accept connections now: Too many open files" in log
        assert "Traceback" not in log
        assert len(log) < LONGEST_LOG
        assert len(log.splitlines()) <= 2
        for connection in idle:
            connection.close()
        wait_until(lambda: status_of(vault, token) == 200, "the vault answers again")


@pytest.mark.slow
def test_connections_are_capped_below_the_descriptor_limit(tmp_path: Path) -> None:
    with LabVault() as vault, ExitStack() as stack:
        vault.stop()
        limit = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh"]
        command = [PROGRAM, "vault", "serve", "--directory", vault.directory, "--request-seconds", "30"]
        log = stack.enter_context((tmp_path / "log").open("wb"))
        server = stack.enter_context(subprocess.Popen([*limit, *command], stdout=subprocess.PIPE, stderr=log))
        stack.callback(server.terminate)
        assert server.stdout is not None
        assert b"listening" in server.stdout.readline()
        token = VaultCredential(vault.administrator_path).token()
        for _ in range(300):
            stack.enter_context(dial(vault))
        assert status_of(vault, token) == 200
        assert len(list(Path(f"/proc/{server.pid}/fd").iterdir())) < 200 - RESERVED_DESCRIPTORS // 2
        said = (tmp_path / "log").read_text()
        assert "closed a waiting connection" in said
        assert "cannot accept" not in said


@pytest.mark.slow
def test_strangers_cause_a_line_per_minute() -> None:
    with served() as vault:
        path = "/keys/a"
        with Raw(vault, None) as raw:
            for _ in range(60):
                assert raw("GET", path, headers={"Authorization": "Bearer x"}).status in (401, 503)
        for _ in range(20):
            with tls(vault) as connection:
                connection.sendall(b"no request\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        log = vault.log_path.read_text()
        assert len(log.splitlines()) <= 2, log
        assert "Traceback" not in log


@pytest.mark.slow
def test_endless_headers_are_refused() -> None:
    with served() as vault, tls(vault) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError, match=CLOSED):
            trickle(connection, b"a: " + b"b" * 1000 + b"\r\n", 0)
