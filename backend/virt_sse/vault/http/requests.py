"""ASGI requests and responses."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Mapping
from uuid import UUID

from starlette.types import Receive, Scope, Send

from virt_sse.vault.refusals import Refusal, too_large

_BODY_SECONDS = 10.0
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"strict-transport-security", b"max-age=31536000"),
    (b"x-content-type-options", b"nosniff"),
)
CLIENT_REQUEST_ID = "x-ms-client-request-id"
DISK = "x-virt-sse-disk"
_PRINTABLE = re.compile(r"[!-~]{1,128}\Z")


class ClientGoneError(Exception):
    """The client closed the connection before sending its whole request."""


def headers_of(scope: Scope) -> Mapping[str, str]:
    """Decode the request headers, with lower-case names."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def correlation_of(headers: Mapping[str, str]) -> UUID:
    """Read the caller's request id, if it is a UUID; otherwise make a new id."""
    return _uuid(headers.get(CLIENT_REQUEST_ID)) or uuid.uuid4()


def disk_of(headers: Mapping[str, str]) -> UUID | None:
    """Read the id of the disk that the caller uses the key for."""
    return _uuid(headers.get(DISK))


def source_of(scope: Scope) -> str:
    """Read the client's address."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """Read the request's body.

    :raise Refusal: When the body is longer than *limit* bytes, or takes too long to arrive.
    :raise ClientGoneError: When the client closes the connection.
    """
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > limit):
        raise too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large(limit)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, "RequestTimeout", "The request body did not arrive in time.") from None


async def respond(
    scope: Scope,
    send: Send,
    status: int,
    body: Mapping[str, object] | None,
    *,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Send a response, with the headers common to all responses."""
    content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    headers = [*_HEADERS, (b"x-ms-request-id", str(uuid.uuid4()).encode())]
    given = dict(scope["headers"]).get(CLIENT_REQUEST_ID.encode(), b"").decode("latin-1")
    if _PRINTABLE.match(given):
        headers.append((CLIENT_REQUEST_ID.encode(), given.encode()))
    if status != 204:
        headers.append((b"content-type", b"application/json; charset=utf-8"))
        headers.append((b"content-length", str(len(content)).encode()))
    headers += [(name.encode(), value.encode()) for name, value in (extra or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def refuse(scope: Scope, send: Send, refusal: Refusal, *, challenge: str | None = None) -> None:
    """Send *refusal* as an error response.

    :param challenge: the ``WWW-Authenticate`` header of a 401.
    """
    extra = {}
    if refusal.retry_after is not None:
        extra["retry-after"] = str(refusal.retry_after)
    if challenge is not None and refusal.status == 401:
        extra["www-authenticate"] = challenge
    await respond(scope, send, refusal.status, refusal.body(), extra=extra)


def _uuid(text: str | None) -> UUID | None:
    if text is None or len(text) > 64:
        return None
    try:
        return UUID(text)
    except ValueError:
        return None
