"""HTTPS to one vault, with the standard library: no proxy, no redirect, no authority but the vault's own."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from virt_sse.errors import (
    InvalidValueError,
    KeyDeniedError,
    KeyProviderUnavailableError,
    PrincipalExistsError,
    PrincipalNotFoundError,
    VaultError,
    VirtSseError,
)
from virt_sse.vault_client.credential_file import CredentialFile, origin

_TIMEOUT_SECONDS = 5.0
_LONGEST_ANSWER = 8 << 20


@dataclass(frozen=True, slots=True)
class Response:
    """:ivar body: may hold a token, so it does not print."""

    status: int
    body: Mapping[str, object] = field(repr=False)


class VaultConnection:
    """Requests to the vault of a credential file. Threads may share one; each request has its own connection.

    :param timeout: in seconds, for connecting and for each answer.
    """

    def __init__(self, credential: CredentialFile, *, timeout: float = _TIMEOUT_SECONDS) -> None:
        self._credential = credential
        self._timeout = timeout
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def json(
        self, method: str, path: str, document: Mapping[str, object] | None = None, *, token: str
    ) -> Response:
        """Send *document* to *path*.

        :raise KeyProviderUnavailableError: When the vault does not answer, or has too much to do.
        """
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = None if document is None else json.dumps(document).encode()
        return self._send(method, path, body, headers)

    def form(self, url: str, fields: Mapping[str, str]) -> Response:
        """Post a form to *url*, which is one of the vault's own.

        :raise KeyProviderUnavailableError: When the vault does not answer, or has too much to do.
        """
        if not self._credential.covers(url):
            raise VaultError("a credential is sent to its own vault alone")
        path = url.split("/", 3)[3]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._send("POST", f"/{path}", urlencode(fields).encode(), headers)

    def _send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Response:
        url = self._credential.vault_url
        _, host, port = origin(url)
        connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._trust())
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            content = answer.read(_LONGEST_ANSWER)
        except (OSError, http.client.HTTPException) as exc:
            raise KeyProviderUnavailableError(f"the key vault {url} does not answer: {_reason(exc)}") from exc
        finally:
            connection.close()
        try:
            document = json.loads(content) if content else {}
        except (ValueError, RecursionError):
            document = {}
        response = Response(answer.status, document if isinstance(document, dict) else {})
        if response.status == 429 or response.status >= 500:
            raise KeyProviderUnavailableError(f"the key vault {url} cannot answer now ({told(response)})")
        return response

    def _trust(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                try:
                    context = ssl.create_default_context(cadata=self._credential.ca_certificate)
                except ssl.SSLError as exc:
                    raise VaultError("the credential file's CA certificate cannot be read") from exc
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                self._context = context
            return self._context


def checked(response: Response) -> Mapping[str, object]:
    """The body of an answer that is what was asked for.

    :raise VirtSseError: By meaning, when the vault refused.
    """
    if response.status < 300:
        return response.body
    kinds: dict[int, type[VirtSseError]] = {
        400: InvalidValueError,
        401: KeyDeniedError,
        403: KeyDeniedError,
        404: PrincipalNotFoundError,
        409: PrincipalExistsError,
    }
    raise kinds.get(response.status, VaultError)(f"the key vault refused ({told(response)})")


def told(response: Response) -> str:
    """The status of an answer and what the vault said, on one line."""
    error = response.body.get("error")
    said = response.body.get("error_description") if isinstance(error, str) else None
    if isinstance(error, dict):
        inner = error.get("innererror")
        code = inner.get("code") if isinstance(inner, dict) else error.get("code")
        said = f"{code}: {error.get('message')}"
    text = " ".join(str(said).split())[:300].rstrip(".") if said else ""
    return f"{response.status} {text}".rstrip()


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {exc.verify_message}"
    if isinstance(exc, TimeoutError):
        return "timed out"
    return " ".join(str(getattr(exc, "strerror", None) or exc or type(exc).__name__).split())
