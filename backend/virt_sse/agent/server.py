"""HTTP on the agent's Unix socket, for root alone.

``POST /hook``
    ``{"event", "domain", "xml"}``, an event of the libvirt hook; ``{"xml"}``, the definition for libvirt or
    null, or ``{"error", "hint"}``
``GET /status``
    the agent's view of domains and keys, in JSON
``GET /metrics``
    metrics, in Prometheus' text format
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import cast

from virt_sse.agent.logs import fields
from virt_sse.agent_client import is_trusted, peer_user
from virt_sse.errors import KeyProviderUnavailableError, LibvirtUnavailableError, StoreError, VirtSseError
from virt_sse.libvirt.hook_script import EVENTS

_log = logging.getLogger(__name__)

_LONGEST_BODY = 16 << 20
_IDLE_SECONDS = 10.0
_JSON = "application/json"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_UNAVAILABLE = (KeyProviderUnavailableError, LibvirtUnavailableError, StoreError)


@dataclass(frozen=True, slots=True)
class AgentService:
    """The agent's functions for the server.

    :ivar hook: serves an event: the event's name, the domain's name, the domain's XML. Returns the definition
        for libvirt; ``None`` for the present one.
    :ivar status: returns the agent's view, for JSON.
    :ivar metrics: returns the metrics in Prometheus' text format.
    """

    hook: Callable[[str, str, str], str | None]
    status: Callable[[], Mapping[str, object]]
    metrics: Callable[[], bytes]


class AgentServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers each connection in its own thread; ``server_close`` waits for requests under way.

    :param listener: a listening socket; the caller closes the socket.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self, listener: socket.socket, service: AgentService) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.service = service

    def verify_request(self, request: object, client_address: object) -> bool:
        user = peer_user(cast("socket.socket", request))
        if not is_trusted(user):
            _log.warning("client-refused", extra=fields({"user": user}))
            return False
        return True

    def handle_error(self, request: object, client_address: object) -> None:
        _log.warning("client-lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _IDLE_SECONDS
    server: AgentServer

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.service.metrics(), _METRICS)
        elif self.path == "/status":
            self._answer_json(HTTPStatus.OK, self.server.service.status())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        if self.path != "/hook":
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")
            return
        try:
            event, domain, xml = _parse_event(self._body())
        except ValueError as exc:
            self._refuse(HTTPStatus.BAD_REQUEST, f"not an event of the libvirt hook: {exc}")
            return
        try:
            changed = self.server.service.hook(event, domain, xml)
        except VirtSseError as exc:
            status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(exc, _UNAVAILABLE) else HTTPStatus.CONFLICT
            self._refuse(status, str(exc), exc.hint)
        except Exception as exc:  # noqa: BLE001 -- a failed event must not end the agent
            _log.exception("hook-failed", extra=fields({"hook": event, "domain": domain}))
            name = type(exc).__name__
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the agent failed: {name}", "see the agent's log")
        else:
            self._answer_json(HTTPStatus.OK, {"xml": changed})

    def _body(self) -> bytes:
        """The request's body.

        :raise ValueError: When ``Content-Length`` is missing, too large, or wrong.
        """
        length = int(self.headers.get("Content-Length") or "")
        if not 0 <= length <= _LONGEST_BODY:
            raise ValueError(f"invalid length of the body: {length} bytes")
        body = self.rfile.read(length)
        if len(body) != length:
            raise ValueError("incomplete body")
        return body

    def _refuse(self, status: HTTPStatus, error: str, hint: str | None = None) -> None:
        self._answer_json(status, {"error": error, "hint": hint})

    def _answer_json(self, status: HTTPStatus, document: Mapping[str, object]) -> None:
        self._answer(status, json.dumps(document).encode() + b"\n", _JSON)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Do nothing: the agent logs its own events."""


def _parse_event(body: bytes) -> tuple[str, str, str]:
    """Event, domain and XML in the body of a hook request.

    :raise ValueError: When the body is invalid.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("not an object")  # noqa: TRY004 -- a document's type is its content here
    event, domain, xml = (document.get(name) for name in ("event", "domain", "xml"))
    if not (isinstance(event, str) and isinstance(domain, str) and isinstance(xml, str)):
        raise ValueError("event, domain and xml must be strings")  # noqa: TRY004 -- likewise
    if event not in EVENTS:
        raise ValueError(f"unknown event {event[:40]!r}")
    return event, domain, xml
