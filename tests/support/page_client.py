"""Requests to the page's application, without a network, and to its sockets."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message

from virt_sse.page.access import Sessions
from virt_sse.page.application import application
from virt_sse.page.document import Overview, decode, encode

_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: str


def page_of(overview: Overview, sessions: Sessions | None = None) -> ASGIApp:
    """The application for *overview*, which is sent as the agent sends it."""
    received = decode(encode(overview)[_LENGTH_BYTES:], Overview)

    async def newest() -> Overview:
        return received

    return application(newest, sessions)


def ask(app: ASGIApp, target: str = "/", method: str = "GET", **headers: str) -> Answer:
    """Send a request; ``host`` is localhost by default. An underscore in a name stands for a hyphen."""
    path, _, query = target.partition("?")
    named = {"host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(n.encode(), v.encode("latin-1")) for n, v in named.items() if v],
        "client": None, "server": None,
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    found = {name.decode(): value.decode("latin-1") for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, body.decode())


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(connection: http.client.HTTPConnection, target: str = "/", **headers: str) -> Answer:
    """Send a GET request on a connection of its own."""
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, answer.read().decode())
    finally:
        connection.close()
