"""Client of the agent: a single HTTP request on the agent's Unix socket.

The libvirt hook imports this module first, for every event: standard library only, and few modules, without
pathlib and typing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator

from virt_sse.errors import AgentError, AgentUnavailableError, VirtSseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import StrPath

SOCKET = "run/virt-sse/agent.sock"
"""Path of the agent's Unix socket, relative to the root."""

TIMEOUT_SECONDS = 30.0
LONGEST_SECONDS = 1e9
"""Sockets overflow with a longer timeout."""

_CREDENTIALS = struct.Struct("3i")
"""``struct ucred`` (unix(7)): process, user, group."""

_LONGEST_ANSWER = 16 << 20
_STATUS_LINE_PARTS = 2
_OK = 200


def peer_user(connection: socket.socket) -> int:
    """The user id of the peer; for a connected client, of the process that called listen(2)."""
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


def is_trusted(user: int) -> bool:
    """Whether agent and clients trust a process of *user*: root, or the user of the calling process."""
    return user in (0, os.geteuid())


def ask(path: StrPath, method: str, target: str, body: bytes = b"", *, timeout: float) -> bytes:
    """Send a request to the agent and return the body of its response.

    :param timeout: for the whole exchange; in seconds.
    :raise AgentUnavailableError: When no agent answers at *path* in time.
    :raise AgentError: When the peer runs as an untrusted user. No data is sent in this case.
    :raise VirtSseError: With the agent's message, when the response reports an error.
    """
    request = (
        f"{method} {target} HTTP/1.0\r\nHost: agent\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    deadline = time.monotonic() + timeout
    with _connected(path, timeout) as connection:
        try:
            connection.sendall(request + body)
            status, answer = _parse(_read(connection, deadline))
        except TimeoutError as exc:
            raise AgentUnavailableError(f"the agent does not answer within {timeout:g} s") from exc
        except (OSError, ValueError) as exc:
            raise AgentUnavailableError(f"the agent at {path} does not answer: {exc}") from exc
    if status == _OK:
        return answer
    try:
        document = json.loads(answer)
        message, hint = str(document["error"]), document.get("hint") and str(document["hint"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        message, hint = f"the agent answered with status {status}", None
    raise VirtSseError(message, hint=hint)


def serve_event(root: StrPath, event: str, domain: str, xml: str) -> str | None:
    """Let the agent serve an event of the libvirt hook.

    :return: the definition for libvirt, empty for the present one; ``None`` if no agent serves the event.
    :raise VirtSseError: With the agent's message, when the agent refuses the event.
    """
    path = os.path.join(root, SOCKET)  # noqa: PTH118 -- pathlib loads slowly
    if not os.path.exists(path):  # noqa: PTH110 -- likewise
        return None
    body = json.dumps({"event": event, "domain": domain, "xml": xml}).encode()
    try:
        answer = ask(path, "POST", "/hook", body, timeout=configured_timeout(root))
        return str(json.loads(answer).get("xml") or "")
    except AgentUnavailableError:
        return None


def configured_timeout(root: StrPath) -> float:
    """Option ``timeout`` in ``[agent]`` of the configuration file; the default if missing or invalid."""
    try:
        path = os.path.join(root, "etc/virt-sse/config.toml")  # noqa: PTH118 -- pathlib loads slowly
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 -- likewise
            text = file.read()
        if "[agent]" in text:
            # Not by Config.load, the only other reader: the hook runs this module first, for every event, and
            # importing virt_sse.config takes five times longer than importing this module. If the option is
            # invalid, Config.load reports the error once the hook serves the event without the agent.
            import tomllib

            timeout = tomllib.loads(text)["agent"]["timeout"]
            if type(timeout) in (int, float) and 0 < timeout < LONGEST_SECONDS:
                return float(timeout)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return TIMEOUT_SECONDS


@contextlib.contextmanager
def _connected(path: StrPath, timeout: float) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
        except OSError as exc:
            raise AgentUnavailableError(
                f"no agent answers at {path}: {exc.strerror or exc}", hint="systemctl start virt-sse-agent"
            ) from exc
        user = peer_user(connection)
        if not is_trusted(user):
            raise AgentError(f"a process of user {user} answers at {path}, not the agent")
        yield connection


def _read(connection: socket.socket, deadline: float) -> bytes:
    """Read until the peer closes the connection.

    :raise ValueError: When the peer sends more than :data:`_LONGEST_ANSWER` bytes.
    """
    received = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        if not (part := connection.recv(1 << 16)):
            return bytes(received)
        received += part
        if len(received) > _LONGEST_ANSWER:
            raise ValueError(f"the answer has more than {_LONGEST_ANSWER >> 20} MiB")


def _parse(response: bytes) -> tuple[int, bytes]:
    """Status and body of an HTTP/1 response (RFC 9112 §4).

    :raise ValueError: When *response* is malformed or truncated.
    """
    head, end, body = response.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    words = first.split(b" ", _STATUS_LINE_PARTS)
    if not end or not words[0].startswith(b"HTTP/1.") or len(words) < _STATUS_LINE_PARTS:
        raise ValueError("the answer was cut off")
    for line in fields:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and int(value) != len(body):
            raise ValueError("the answer was cut off")
    return int(words[1]), body
