"""HTTPS to one vault, with the standard library: no proxy, no redirects, and trust in the vault's CA only."""

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
    printable,
)
from virt_sse.vault_client.credential_file import CredentialFile, origin
from virt_sse.vault_client.deadlines import DeadlineSocket, within

_TIMEOUT_SECONDS = 5.0
_LONGEST_ANSWER = 8 << 20


@dataclass(frozen=True, slots=True)
class Response:
    """A response of the vault.

    :ivar body: may contain an access token, therefore not in the repr.
    """

    status: int
    body: Mapping[str, object] = field(repr=False)


class VaultConnection:
    """Sends requests to the vault of a credential file, each over a new connection. Thread-safe.

    :param timeout: in seconds, for connecting, for the handshake, and for request and response as a whole.
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

        :raise KeyProviderUnavailableError: When the vault does not answer, or is overloaded.
        """
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = None if document is None else json.dumps(document).encode()
        return self._send(method, path, body, headers)

    def form(self, url: str, fields: Mapping[str, str]) -> Response:
        """Post a form to *url*, a URL of the vault.

        :raise KeyProviderUnavailableError: When the vault does not answer, or is overloaded.
        """
        if not self._credential.covers(url):
            raise VaultError("a credential must only be sent to its own vault")
        path = url.split("/", 3)[3]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._send("POST", f"/{path}", urlencode(fields).encode(), headers)

    def _send(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Response:
        url = self._credential.vault_url
        _, host, port = origin(url)
        connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._trust())
        try:
            with within(self._timeout):
                connection.request(method, path, body, dict(headers))
                answer = connection.getresponse()
                content = answer.read(_LONGEST_ANSWER)
        except (OSError, http.client.HTTPException) as exc:
            raise KeyProviderUnavailableError(f"the key vault {url} does not answer: {_reason(exc)}") from exc
        finally:
            connection.close()
        response = Response(answer.status, document_of(content))
        if response.status == 429 or response.status >= 500:
            raise KeyProviderUnavailableError(f"the key vault {url} cannot answer now ({describe(response)})")
        return response

    def _trust(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                authority = self._credential.ca_certificate
                if not authority:  # OpenSSL would trust the system's authorities
                    raise VaultError("the credential file has no CA certificate")
                try:
                    context = ssl.create_default_context(cadata=authority)
                except (ssl.SSLError, TypeError) as exc:
                    raise VaultError("the credential file's CA certificate cannot be read") from exc
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.sslsocket_class = DeadlineSocket
                self._context = context
            return self._context


def document_of(content: bytes) -> Mapping[str, object]:
    """The JSON object in the body of a response; empty if *content* is anything else."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def checked(response: Response) -> Mapping[str, object]:
    """Return the body of a successful response.

    :raise VirtSseError: With the meaning of the status, when the vault refused.
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
    raise kinds.get(response.status, VaultError)(f"the key vault refused ({describe(response)})")


def describe(response: Response) -> str:
    """Describe the status and error of a response in one line."""
    error = response.body.get("error")
    said = response.body.get("error_description") if isinstance(error, str) else None
    if isinstance(error, dict):
        inner = error.get("innererror")
        code = inner.get("code") if isinstance(inner, dict) else error.get("code")
        said = f"{code}: {error.get('message')}"
    text = printable(" ".join(str(said).split())[:300].rstrip(".")) if said else ""
    return f"{response.status} {text}".rstrip()


def _reason(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {exc.verify_message}"
    if isinstance(exc, TimeoutError):
        return "timed out"
    return " ".join(str(getattr(exc, "strerror", None) or exc or type(exc).__name__).split())
