"""One HTTPS request over a new connection, with the standard library: no proxy, no redirects, a deadline."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from virt_sse.errors import KeyProviderUnavailableError
from virt_sse.vault_client.deadlines import DeadlineSocket, remaining
from virt_sse.vault_client.failures import failure_reason

_LONGEST_ANSWER = 8 << 20


def origin(url: str) -> tuple[str, str, int]:
    """Split a URL into scheme, host and port.

    :raise ValueError: When *url* has no host, or has user information.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise ValueError("the URL must have a host, and no user information")
    return parts.scheme.lower(), parts.hostname.lower(), parts.port or 443


def tls_context(authorities: str | None) -> ssl.SSLContext:
    """TLS for :func:`exchange`.

    :param authorities: the only trusted certificates, in PEM; ``None`` for the system's.
    :raise ssl.SSLError: When *authorities* cannot be parsed.
    """
    context = ssl.create_default_context(cadata=authorities)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = DeadlineSocket
    return context


def exchange(
    url: str,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    context: ssl.SSLContext,
    connection_timeout: float,
) -> tuple[int, bytes]:
    """Send one request to the server at *url*; the answer's status and content.

    Call in a block of :func:`~virt_sse.vault_client.deadlines.within`, which limits the whole exchange.

    :param context: from :func:`tls_context`.
    :param connection_timeout: in seconds, for the connection, and again for the TLS handshake.
    :raise KeyProviderUnavailableError: When the server does not answer, or not in time.
    """
    _, host, port = origin(url)
    left = remaining()
    limit = connection_timeout if left is None else min(connection_timeout, left)
    # A timeout of 0 would make the socket non-blocking.
    connection = http.client.HTTPSConnection(host, port, timeout=max(limit, 0.001), context=context)
    try:
        connection.connect()
        connection.sock.settimeout(remaining() or limit)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(_LONGEST_ANSWER)
    except (OSError, http.client.HTTPException) as exc:
        raise KeyProviderUnavailableError(
            f"the key vault {url} does not answer: {failure_reason(exc)}"
        ) from exc
    finally:
        connection.close()


def document_of(content: bytes) -> Mapping[str, object]:
    """The JSON object in the body of a response; empty if *content* is anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
