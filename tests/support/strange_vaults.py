"""A server that answers requests for a vault in invalid ways, and a server that never answers."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from virt_sse.vault.home.certificates import new_authority, new_server_certificate
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key

TENANT = "00000000-0000-4000-8000-00000000000f"
TOKEN = "not-a-token-but-as-secret-as-one"  # noqa: S105 -- valid nowhere


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class StrangeVault:
    """Gives a token to every client, and :attr:`answers` to requests with the token; the last answer repeats.

    Below ``/v1/`` it speaks like Vault and OpenBao, elsewhere like Azure Key Vault.

    ``None`` among the answers breaks the connection.

    :ivar seen: the requests with a token.
    :ivar tokens: the number of token requests.
    :ivar challenge: makes the challenge of the vault at a URL.
    :ivar token_answer: the answer of the token endpoint, instead of a token.
    :ivar pause: seconds between the bytes of each answer, in packets of their own; ``None``: one packet.
    """

    def __init__(self, folder: Path) -> None:
        self.answers: list[Answer | None] = [Answer()]
        self.seen: list[Seen] = []
        self.tokens = 0
        self.challenge: Callable[[str], str] = lambda url: (
            f'Bearer authorization="{url}/{TENANT}", resource="{url}"'
        )
        self.token_answer: Answer | None = None
        self.pause: float | None = None
        self._ca, ca_key = new_authority("strange")
        certificate = folder / "strange-server.pem"
        certificate.write_bytes(new_server_certificate(self._ca, ca_key, ("127.0.0.1",)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._folder = folder

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def credential_file(self, *, url: str | None = None, ca: bytes | None = None) -> Path:
        path = self._folder / f"credential-{time.monotonic_ns()}.json"
        url = url or self.url
        CredentialFile(
            vault_url=url,
            ca_certificate=(ca or self._ca).decode(),
            audience=url,
            tenant=TENANT,
            client_id="client",
            object_id="object",
            token_endpoint=f"{url}/{TENANT}/oauth2/v2.0/token",
            private_key=new_assertion_key()[0],
            expires=None,
        ).write(path)
        return path

    def ca_file(self) -> Path:
        """The authority of the server's certificate, in PEM."""
        path = self._folder / "strange-ca.pem"
        path.write_bytes(self._ca)
        return path

    def next_answer(self) -> Answer | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def document(**members: object) -> Answer:
    return Answer(200, json.dumps(members).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: object, inner: object = None, **headers: str) -> Answer:
    error = {"code": code, "message": "m"} | ({"innererror": {"code": inner}} if inner else {})
    return Answer(
        status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"} | headers
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


def _handler(vault: StrangeVault) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20
        wbufsize = 1 << 20  # send each answer in a single packet

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.endswith("/oauth2/v2.0/token"):
                vault.tokens += 1
                token = {"access_token": TOKEN, "expires_in": 900, "token_type": "Bearer"}
                self.send(vault.token_answer or document(**token))
            elif self.path.startswith("/v1/auth/"):
                vault.tokens += 1
                auth = {"client_token": TOKEN, "lease_duration": 900, "renewable": True}
                self.send(vault.token_answer or document(auth=auth))
            elif self.path.startswith("/v1/"):
                vault.seen.append(Seen(self.command, self.path, dict(self.headers.items()), body))
                self.send(vault.next_answer())
            elif self.headers.get("Authorization") is None:
                challenge = {"WWW-Authenticate": vault.challenge(vault.url)}
                self.send(refusal(401, "Unauthorized", **challenge))
            else:
                vault.seen.append(Seen(self.command, self.path, dict(self.headers.items()), body))
                self.send(vault.next_answer())

        do_GET = do_POST = handle_any

        def send(self, answer: Answer | None) -> None:
            if answer is None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            if vault.pause is None:
                self.end_headers()
                self.wfile.write(answer.body)
                return
            content = b"".join(self._headers_buffer) + b"\r\n" + answer.body
            for byte in content:
                self.connection.sendall(bytes([byte]))
                time.sleep(vault.pause)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
            """Write no log."""

    return Handler


class Listener:
    """Accepts connections, keeps them open, and never sends a byte."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)
        for connection in self.connections:
            connection.close()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._socket.accept()[0])
            except OSError:
                return
