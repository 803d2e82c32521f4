"""HTTPS to the vault of a credential file, with trust in the vault's CA only."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from virt_sse.errors import (
    InvalidValueError,
    KeyDeniedError,
    KeyNotFoundError,
    KeyProviderUnavailableError,
    PrincipalExistsError,
    PrincipalNotFoundError,
    VaultError,
    VirtSseError,
    printable,
)
from virt_sse.vault_client.addresses import VaultAddresses
from virt_sse.vault_client.credential_file import CredentialFile
from virt_sse.vault_client.deadlines import within
from virt_sse.vault_client.exchange import document_of, exchange, tls_context

_TIMEOUT_SECONDS = 5.0


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
    :param addresses: of the vault; by default, the credential file's URL.
    """

    def __init__(
        self,
        credential: CredentialFile,
        *,
        timeout: float = _TIMEOUT_SECONDS,
        addresses: VaultAddresses | None = None,
    ) -> None:
        self._credential = credential
        self._timeout = timeout
        self._addresses = addresses or VaultAddresses((credential.vault_url,))
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
        return self._send(method, path, lambda: body, headers, repeatable=method == "GET")

    def form(self, url: str, fields: Callable[[], Mapping[str, str]]) -> Response:
        """Post a form to *url*, a URL of the vault.

        :param fields: makes the form, anew for each address that is tried: an assertion is for one use.
        :raise KeyProviderUnavailableError: When the vault does not answer, or is overloaded.
        """
        if not self._credential.covers(url):
            raise VaultError("a credential must only be sent to its own vault")
        path = url.split("/", 3)[3]
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._send("POST", f"/{path}", lambda: urlencode(fields()).encode(), headers, repeatable=True)

    def _send(
        self,
        method: str,
        path: str,
        body: Callable[[], bytes | None],
        headers: Mapping[str, str],
        *,
        repeatable: bool,
    ) -> Response:
        context = self._trust()

        def ask(url: str) -> Response:
            with within(self._timeout):
                status, content = exchange(
                    url, method, path, body(), headers, context=context, connection_timeout=self._timeout
                )
            response = Response(status, document_of(content))
            if status == 429 or status >= 500:
                raise KeyProviderUnavailableError(
                    f"the key vault {url} cannot answer now ({describe(response)})"
                )
            return response

        return self._addresses.first_answer(ask, timeout=self._timeout, repeatable=repeatable)

    def _trust(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                authority = self._credential.ca_certificate
                if not authority:  # OpenSSL would trust the system's authorities
                    raise VaultError("the credential file has no CA certificate")
                try:
                    self._context = tls_context(authority)
                except (ssl.SSLError, TypeError) as exc:
                    raise VaultError("the credential file's CA certificate cannot be read") from exc
            return self._context


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
    kind = KeyNotFoundError if _code(response) == "KeyNotFound" else kinds.get(response.status, VaultError)
    raise kind(f"the key vault refused ({describe(response)})")


def _code(response: Response) -> object:
    """The most exact code of an error in Azure's form."""
    error = response.body.get("error")
    if not isinstance(error, dict):
        return None
    inner = error.get("innererror")
    return inner.get("code") if isinstance(inner, dict) else error.get("code")


def describe(response: Response) -> str:
    """Describe the status and error of a response in one line."""
    error = response.body.get("error")
    said = response.body.get("error_description") if isinstance(error, str) else None
    if isinstance(error, dict):
        said = f"{_code(response)}: {error.get('message')}"
    text = printable(" ".join(str(said).split())[:300].rstrip(".")) if said else ""
    return f"{response.status} {text}".rstrip()
