"""Parsers of what arrives through sockets: the agent's, a PKCS#11 process's, an HTTPS server's."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from support.fuzzing import Parse, Parser, always
from virt_sse import agent_client
from virt_sse.agent.server import AgentServer, AgentService, _parse_event
from virt_sse.errors import KeyNotFoundError, VirtSseError
from virt_sse.pkcs11.messages import (
    ANSWERS,
    OUTCOMES,
    Channel,
    MessageError,
    Refused,
    Returned,
    decode,
    refused_frame,
    returned_frame,
)
from virt_sse.pkcs11.token import TokenKey

_EVENT = b'{"event": "release", "domain": "web", "xml": "<domain/>"}'
_REQUEST = b"POST /hook HTTP/1.0\r\nHost: agent\r\nContent-Length: %d\r\n\r\n%s" % (len(_EVENT), _EVENT)
_ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n{}\n"
_REFUSAL_BODY = b'{"error": "no key", "hint": "say so"}'
_REFUSAL = b"HTTP/1.0 409 Conflict\r\nContent-Length: %d\r\n\r\n%s" % (len(_REFUSAL_BODY), _REFUSAL_BODY)


@contextlib.contextmanager
def _agent_server(_folder: Path) -> Iterator[Parse]:
    """An agent's server: after any request, the server answers the next, and shows no traceback."""
    faults: list[BaseException] = []

    class Server(AgentServer):
        def handle_error(self, request: object, client_address: object) -> None:
            import sys

            if (fault := sys.exception()) and not isinstance(fault, OSError):
                faults.append(fault)

    with TemporaryDirectory(prefix="fuzz-") as short, socket.socket(socket.AF_UNIX) as listener:
        path = Path(short) / "s"
        listener.bind(str(path))
        listener.listen()
        server = Server(listener, AgentService(lambda *_: None, dict, lambda: b""))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()

        def parse(content: bytes) -> None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(str(path))
                with contextlib.suppress(OSError):
                    client.sendall(content)
                    client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
            if faults:
                raise faults.pop()

        try:
            yield parse
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def _require_text(hint: object) -> None:
    assert hint is None or isinstance(hint, str)


@contextlib.contextmanager
def _agent_answers(_folder: Path) -> Iterator[Parse]:
    """A process in the agent's place that answers with any bytes."""
    with TemporaryDirectory(prefix="fuzz-") as short, socket.socket(socket.AF_UNIX) as listener:
        path = Path(short) / "s"
        listener.bind(str(path))
        listener.listen()

        def parse(content: bytes) -> None:
            def serve() -> None:
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(content)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                agent_client.ask(path, "GET", "/status", timeout=5)
            except VirtSseError as exc:
                _require_text(exc.hint)
                raise
            finally:
                thread.join()

        yield parse


def _frames(content: bytes) -> None:
    ours, process = socket.socketpair()
    with ours, process:
        process.sendall(content)
        process.shutdown(socket.SHUT_WR)
        channel = Channel(ours)
        while True:
            try:
                answer = decode(channel.receive(time.monotonic() + 5), ANSWERS)
            except EOFError:
                return
            if isinstance(answer, Refused):
                error = answer.error()
                assert error.hint is None or error.hint.isprintable()
                raise error
            if isinstance(answer, Returned):
                decode(answer.value, _KEYS)


def _outcome(content: bytes) -> None:
    decode(content, OUTCOMES)


_KEYS: msgspec.msgpack.Decoder[list[TokenKey]] = msgspec.msgpack.Decoder(list[TokenKey])
_FRAMES = [returned_frame([]), refused_frame(KeyNotFoundError("no key", hint="make a key"))]

PARSERS = [
    Parser("agent-event", always(_parse_event), [_EVENT], (ValueError,), document=True),
    Parser("agent-request", _agent_server, [_REQUEST, b"GET /status HTTP/1.0\r\n\r\n"], ()),
    Parser("agent-answer", _agent_answers, [_ANSWER, _REFUSAL]),
    Parser(
        "pkcs11-frames",
        always(_frames),
        [len(frame).to_bytes(4, "big") + frame for frame in _FRAMES],
        (MessageError, VirtSseError),
    ),
]
