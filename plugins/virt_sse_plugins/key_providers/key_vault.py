"""Client of one key vault, on top of Azure's SDK; turns refusals and failures into errors by meaning.

Only a genuine answer of the vault is a verdict on a key. Any answer unlike a key vault's counts as no answer.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from virt_sse.api import (
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyProviderError,
    KeyProviderUnavailableError,
    VirtSseError,
)
from virt_sse.vault_client.deadlines import DeadlineSocket, within
from virt_sse.vault_client.failures import causes, failure_reason
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey
from virt_sse_plugins.key_providers.key_vault_access import Access

if TYPE_CHECKING:
    from azure.core.pipeline.transport import RequestsTransport
    from azure.core.rest import HttpRequest, HttpResponse
    from azure.keyvault.keys import KeyClient

_CODE = re.compile(r"[A-Za-z]{1,64}", re.ASCII)
_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_SOON_SECONDS = 1.0
MOST_ANSWERS = 3
"""The answers to a request: a challenge, a token, and the result."""


def _transport(*, use_env_settings: bool, **options: Any) -> RequestsTransport:
    """The SDK's transport, with its *options*, over connections whose reads end at a deadline."""
    import requests
    from azure.core.pipeline.transport import RequestsTransport
    from requests.adapters import HTTPAdapter
    from urllib3.util.ssl_ import create_urllib3_context

    class DeadlineAdapter(HTTPAdapter):
        def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
            context = create_urllib3_context()
            context.sslsocket_class = DeadlineSocket
            super().init_poolmanager(*arguments, **named, ssl_context=context)

    session = requests.Session()
    session.trust_env = use_env_settings
    session.mount("https://", DeadlineAdapter())
    return RequestsTransport(session=session, use_env_settings=use_env_settings, **options)


class UnacceptableError(KeyProviderError):
    """The vault considers the request invalid."""


class KeyVault:
    """The vault at *url*, used with one identity. Safe to share between threads, and across a fork.

    The SDK's clients are not thread-safe (a refused token is discarded during another thread's request), so
    each request uses its own client.

    :param url: as in :class:`~virt_sse_plugins.key_providers.key_urls.KeyVaultKey`; *access* covers it.
    :param connection_timeout: in seconds.
    :param read_timeout: in seconds; a request, its challenge and its token take at most three times as long.
    """

    def __init__(self, url: str, access: Access, *, connection_timeout: float, read_timeout: float) -> None:
        self.url = url
        self._access = access
        self._connection_timeout = connection_timeout
        self._read_timeout = read_timeout
        self._idle: dict[int, deque[KeyClient]] = {}
        self._closed = False

    def ask(
        self,
        what: str,
        key: KeyVaultKey,
        method: str,
        operation: str = "",
        *,
        body: Mapping[str, str] | None = None,
        headers: Mapping[str, str],
        repeatable: bool = True,
    ) -> Mapping[str, object]:
        """Send one request about *key*, and return the vault's answer.

        Retries once each: after an immediate loss of the connection, after a refused token with a new token,
        and after a short delay requested by the vault.

        :param what: the request, for the message "key vault refused the {what}".
        :param operation: the end of the request's path; empty for reading the key.
        :param repeatable: whether the request is idempotent.
        :raise KeyProviderError: A subclass by meaning, when the vault refuses or does not answer.
        """
        path = "/".join(filter(None, (key.version, operation)))
        request = _request(method, f"/keys/{key.name}/{path}", body, headers)
        renewable, attempts, began = True, 2 if repeatable else 1, time.monotonic()
        while True:
            attempts -= 1
            outcome = self._send(what, request)
            if isinstance(outcome, Exception):
                soon = time.monotonic() - began < _SOON_SECONDS
                if not attempts or not soon or not _was_lost(outcome):
                    raise self._unanswered(outcome) from _chainable(outcome)
                time.sleep(_PAUSE_SECONDS)
            elif outcome.status_code == HTTPStatus.UNAUTHORIZED and renewable and self._access.renew():
                renewable, attempts = False, 1
            elif attempts and (pause := _pause(outcome)) is not None:
                time.sleep(pause)
            else:
                return self._checked(what, key, outcome)

    def close(self) -> None:
        """Close all connections; a connection in use is closed after its request."""
        self._closed = True
        self._close_idle()

    def _send(self, what: str, request: HttpRequest) -> HttpResponse | Exception:
        """The answer, or the exception of a failed request. A refused token is an answer, too.

        :raise KeyProviderError: When the identity is the cause of the failure.
        """
        with self._client() as client:
            try:
                with within(MOST_ANSWERS * self._read_timeout):
                    return client.send_request(request)
            except KeyDeniedError as exc:
                raise KeyDeniedError(
                    f"key vault refused the {what}: no token for {self._access.who()}",
                    hint="the identity was deleted or disabled, or has expired",
                ) from exc
            except KeyProviderError:
                raise
            except VirtSseError as exc:  # about the credential file
                raise KeyProviderUnavailableError(str(exc), hint=exc.hint) from exc
            except Exception as exc:  # noqa: BLE001 -- any failure of the SDK means: no answer of the vault
                return exc

    @contextlib.contextmanager
    def _client(self) -> Iterator[KeyClient]:
        idle = self._idle.setdefault(os.getpid(), deque())  # a fork must not use its parent's connections
        try:
            client = idle.pop()
        except IndexError:
            client = self._new_client()
        try:
            yield client
        finally:
            idle.append(client)
            if self._closed:
                self._close_idle()

    def _new_client(self) -> KeyClient:
        from azure.keyvault.keys import KeyClient

        return KeyClient(
            self.url,
            self._access.credential(self.url),
            transport=_transport(
                connection_verify=self._access.authorities(),
                connection_timeout=self._connection_timeout,
                read_timeout=self._read_timeout,
                use_env_settings=self._access.follows_environment,
            ),
            retry_total=0,
            permit_redirects=False,
            verify_challenge_resource=False,  # Access does, also for vaults other than Azure's
        )

    def _close_idle(self) -> None:
        idle = self._idle.get(os.getpid(), ())
        with contextlib.suppress(IndexError):
            while idle:
                idle.pop().close()

    def _checked(self, what: str, key: KeyVaultKey, response: HttpResponse) -> Mapping[str, object]:
        status = response.status_code
        document = _document(response)
        if status == HTTPStatus.OK and document is not None and "error" not in document:
            return document
        reason = _reason(document)
        told = f"{status} {reason}" if reason else f"{status}"
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise KeyProviderUnavailableError(f"the key vault {self.url} cannot answer now ({told})")
        if reason is None or status < HTTPStatus.BAD_REQUEST:
            raise self._not_a_vault(told)
        raise self._refusal(what, key, status, reason)

    def _refusal(self, what: str, key: KeyVaultKey, status: int, reason: str) -> KeyProviderError:
        message = f"key vault refused the {what} ({status} {reason})"
        about = f"{key.url}/{key.version}" if key.version else key.url
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            if reason == "KeyDisabled":
                return KeyDisabledError(message, hint=f"the key's administrator can enable {about}")
            return KeyDeniedError(
                message, hint=f"the key's administrator can permit {self._access.who()} to use {about}"
            )
        if status == HTTPStatus.NOT_FOUND and reason == "KeyNotFound":
            return KeyNotFoundError(
                message, hint=f"{about} does not exist; a deleted key can be recovered until purged"
            )
        if status == HTTPStatus.NOT_FOUND:
            return self._not_a_vault(f"{status} {reason}")
        if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
            return UnacceptableError(message)
        return KeyProviderError(message)

    def _not_a_vault(self, told: str) -> KeyProviderUnavailableError:
        return KeyProviderUnavailableError(f"{self.url} does not answer like a key vault ({told})")

    def _unanswered(self, failure: Exception) -> KeyProviderUnavailableError:
        reason = failure_reason(failure)
        return KeyProviderUnavailableError(f"the key vault {self.url} does not answer: {reason}")


def _request(
    method: str, path: str, body: Mapping[str, str] | None, headers: Mapping[str, str]
) -> HttpRequest:
    from azure.core.rest import HttpRequest

    if body is None:
        return HttpRequest(method, path, headers=dict(headers))
    return HttpRequest(method, path, headers=dict(headers), json=dict(body))


def _document(response: HttpResponse) -> Mapping[str, object] | None:
    try:
        document = response.json()
    except Exception:  # noqa: BLE001 -- the SDK raises many exceptions for malformed JSON
        return None
    return document if isinstance(document, dict) else None


def _reason(document: Mapping[str, object] | None) -> str | None:
    """The most specific error code; only letters, so that messages show nothing else of an answer."""
    error = document.get("error") if document is not None else None
    if not isinstance(error, dict):
        return None
    inner = error.get("innererror")
    for code in (inner.get("code") if isinstance(inner, dict) else None, error.get("code")):
        if isinstance(code, str) and _CODE.fullmatch(code):
            return code
    return None


def _pause(response: HttpResponse) -> float | None:
    """Seconds to wait before a retry, as requested by the vault; ``None`` for none or a long delay."""
    if response.status_code not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return None
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= _LONGEST_PAUSE_SECONDS else None


def _was_lost(failure: Exception) -> bool:
    """Whether a connection was refused or lost: a new connection may work."""
    from azure.core.exceptions import (
        ServiceRequestError,
        ServiceRequestTimeoutError,
        ServiceResponseError,
        ServiceResponseTimeoutError,
    )

    timeouts = (ServiceRequestTimeoutError, ServiceResponseTimeoutError)
    return isinstance(failure, ServiceRequestError | ServiceResponseError) and not isinstance(
        failure, timeouts
    )


def _chainable(failure: Exception) -> Exception | None:
    """*failure* without the request, which contains a DEK; ``None`` if its answer may contain a DEK."""
    from azure.core.exceptions import HttpResponseError

    if isinstance(failure, HttpResponseError):
        return None
    for cause in causes(failure):
        for name in ("request", "response"):
            if getattr(cause, name, None) is not None:
                with contextlib.suppress(AttributeError):
                    setattr(cause, name, None)
    return failure
