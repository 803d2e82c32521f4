"""Client of a Vault or OpenBao server; turns its refusals into errors by meaning.

Only a genuine refusal is a verdict on a key. A sealed server, a standby without an active server, a proxy's
page and an answer that makes no sense count as no answer.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Mapping

from virt_sse.api import (
    KeyDeniedError,
    KeyNotFoundError,
    KeyProviderError,
    VirtSseError,
    current_correlation,
)
from virt_sse.vault_client.addresses import VaultAddresses
from virt_sse.vault_client.deadlines import within
from virt_sse.vault_client.exchange import exchange
from virt_sse_plugins.key_providers.transit_answers import TransitAnswer
from virt_sse_plugins.key_providers.transit_login import Send, TransitLogin
from virt_sse_plugins.key_providers.transit_options import TransitOptions

_CLOSING_SECONDS = 1.0


class TransitRejectionError(KeyProviderError):
    """The server considers the request invalid."""


class TransitServer:
    """A server or cluster at one or several addresses, used with one identity. Thread-safe.

    Each request has its own connection: no connection outlives a fork or a failover.
    """

    def __init__(self, options: TransitOptions) -> None:
        self._options = options
        self._addresses = VaultAddresses(options.urls)
        self._login = TransitLogin(options)
        self._context: ssl.SSLContext | None = None
        self._stamp: object = None
        self._lock = threading.Lock()

    def ask(
        self,
        what: str,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        disk: str | None = None,
        repeatable: bool = True,
    ) -> Mapping[str, object]:
        """Send one request, and return the ``data`` of the answer.

        :param what: the request, for the message "key vault refused the {what}".
        :param path: below the server's ``/v1/``.
        :param disk: id of the disk whose DEK is used, for the server's audit log.
        :param repeatable: whether the request is idempotent.
        :raise KeyDeniedError: When the server refuses this identity.
        :raise KeyNotFoundError: When the server has nothing at *path*.
        :raise TransitRejectionError: When the server considers the request invalid.
        :raise KeyProviderUnavailableError: When no address answers.
        """
        content = None if body is None else json.dumps(body).encode()
        context = self._tls()

        def ask(url: str) -> Mapping[str, object]:
            return self._checked(what, self._ask_at(url, context, method, path, content, disk))

        with within(self._options.timeout):
            return self._addresses.first_answer(ask, timeout=self._options.timeout, repeatable=repeatable)

    def close(self) -> None:
        """Revoke and forget the token."""
        token = self._login.drop()
        if token is None:
            return
        with contextlib.suppress(VirtSseError), within(_CLOSING_SECONDS):
            context = self._tls()
            self._addresses.first_answer(
                lambda url: self._sender(url, context)("POST", "auth/token/revoke-self", b"{}", token.value),
                timeout=_CLOSING_SECONDS,
            )

    def _ask_at(
        self, url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None, disk: str | None
    ) -> TransitAnswer:
        send = self._sender(url, context, disk)
        token = self._login.token(send)
        answer = send(method, path, body, token.value)
        if answer.is_denial and (new := self._login.replace(send, token)) is not None:
            return send(method, path, body, new.value)
        return answer

    def _sender(self, url: str, context: ssl.SSLContext, disk: str | None = None) -> Send:
        headers = {"X-Vault-Request": "true", "Content-Type": "application/json"}
        if self._options.namespace:
            headers["X-Vault-Namespace"] = self._options.namespace
        if correlation := current_correlation():
            headers["X-Correlation-Id"] = str(correlation)
        if disk:
            headers["X-Virt-Sse-Disk"] = disk

        def send(method: str, path: str, body: bytes | None, token: str | None) -> TransitAnswer:
            status, content = exchange(
                url,
                method,
                f"/v1/{path}",
                body,
                headers | ({"X-Vault-Token": token} if token else {}),
                context=context,
                connection_timeout=self._options.connection_timeout,
            )
            return TransitAnswer.of(url, status, content)

        return send

    def _checked(self, what: str, answer: TransitAnswer) -> Mapping[str, object]:
        if answer.is_success:
            return answer.data
        message = f"key vault refused the {what}{answer.reason()}"
        if answer.is_denial:
            raise KeyDeniedError(
                message, hint=f"the key's administrator can permit it to the policies of {self._login.who()}"
            )
        if answer.is_absence:
            raise KeyNotFoundError(message, hint="the key or its secrets engine was deleted")
        if answer.is_rejection:
            raise TransitRejectionError(message)
        raise answer.unavailable()

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            stamp = self._login.stamp()
            if self._context is None or stamp != self._stamp:
                self._context, self._stamp = self._login.context(), stamp
            return self._context
