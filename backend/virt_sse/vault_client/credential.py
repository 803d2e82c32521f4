"""Credentials for Azure's SDK, made from a credential file.

:class:`VaultCredential` is a ``TokenCredential``, :class:`AsyncVaultCredential` an ``AsyncTokenCredential``.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from virt_sse.errors import KeyDeniedError, KeyProviderUnavailableError
from virt_sse.vault_client.addresses import VaultAddresses
from virt_sse.vault_client.credential_file import CredentialFile
from virt_sse.vault_client.https import VaultConnection, describe

if TYPE_CHECKING:
    from azure.core.credentials import AccessToken

_GRANT = "client_credentials"
_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_DENIALS = ("invalid_client", "unauthorized_client", "access_denied")
"""Codes of RFC 6749 §5.2 for a denial. A proxy's error page or a wrong clock is no denial."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
"""An access token (RFC 6750 §2.1)."""
_LIFETIMES = range(10 * 366 * 86400)
"""Lifetimes of access tokens in seconds; with a longer one, times overflow."""
_RENEW_BEFORE = 0.2
"""Fraction of an access token's lifetime; with less than this left, a new token is requested."""


class VaultCredential:
    """Requests access tokens with a credential file's key, and caches a token until shortly before it
    expires.

    Thread-safe. Talks only to the file's token endpoint, and issues tokens only for the file's audience. A
    client sends the token to its own URL, so check with :meth:`covers` before passing the credential to a
    client.

    :param timeout: in seconds, for connecting and for each response.
    :param addresses: returns the addresses of the vault at a URL; by default, the URL itself.
    """

    def __init__(
        self,
        file: CredentialFile | Path,
        *,
        timeout: float = 5.0,
        addresses: Callable[[str], VaultAddresses] | None = None,
    ) -> None:
        self._file = CredentialFile.read(file) if isinstance(file, Path) else file
        self._connection = VaultConnection(
            self._file, timeout=timeout, addresses=addresses(self._file.vault_url) if addresses else None
        )
        self._lock = threading.Lock()
        self._token: tuple[str, int] | None = None
        self._renew_at = 0.0
        self._ca: int | None = None

    def __repr__(self) -> str:
        return f"VaultCredential({self._file.client_id!r} at {self._file.vault_url!r})"

    @property
    def file(self) -> CredentialFile:
        """The credential file."""
        return self._file

    @property
    def connection(self) -> VaultConnection:
        """The connection to the vault."""
        return self._connection

    def covers(self, url: str) -> bool:
        """Check that *url* belongs to the credential's vault."""
        return self._file.covers(url)

    def ca_file(self) -> str:
        """Return a path of the CA certificate, for ``connection_verify``; valid until :meth:`close`."""
        with self._lock:
            if self._ca is None:
                self._ca = os.memfd_create("vault-ca")
                os.write(self._ca, self._file.ca_certificate.encode())
            return f"/proc/self/fd/{self._ca}"

    def get_token(
        self,
        *scopes: str,
        claims: str | None = None,
        tenant_id: str | None = None,
        **_others: object,
    ) -> AccessToken:
        """Return an access token; the interface is defined by :mod:`azure.core`.

        :raise KeyDeniedError: When the vault denies a token, or *scopes* or *tenant_id* are not the file's.
        :raise KeyProviderUnavailableError: When the vault does not answer.
        """
        from azure.core.credentials import AccessToken

        if scopes != (f"{self._file.audience}/.default",):
            raise KeyDeniedError(f"the credential is for the vault {self._file.vault_url} alone")
        if tenant_id is not None and tenant_id != self._file.tenant:
            raise KeyDeniedError("the tenant of the credential is not the requested tenant")
        return AccessToken(*self._current())

    def token(self) -> str:
        """Return an access token for the vault.

        :raise KeyDeniedError: When the vault denies a token.
        :raise KeyProviderUnavailableError: When the vault does not answer.
        """
        return self._current()[0]

    def forget(self) -> None:
        """Drop the cached token."""
        with self._lock:
            self._token = None

    def close(self) -> None:
        """Drop the cached token and close the CA certificate's file."""
        with self._lock:
            self._token = None
            if self._ca is not None:
                os.close(self._ca)
                self._ca = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _current(self) -> tuple[str, int]:
        with self._lock:
            if self._token is not None and time.monotonic() < self._renew_at:
                return self._token
            try:
                self._token = self._ask()
            except KeyProviderUnavailableError:
                if self._token is None or self._token[1] <= time.time():
                    raise
            return self._token

    def _ask(self) -> tuple[str, int]:
        asked, now = time.monotonic(), time.time()
        answer = self._connection.form(self._file.token_endpoint, self._form)
        if answer.status in (400, 401) and answer.body.get("error") in _DENIALS:
            raise KeyDeniedError(f"the key vault {self._file.vault_url} gave no token ({describe(answer)})")
        if answer.status != 200:
            raise KeyProviderUnavailableError(
                f"the key vault {self._file.vault_url} gave no token ({describe(answer)})"
            )
        token, seconds = issued_token(answer.body, self._file.vault_url)
        self._renew_at = asked + seconds * (1 - _RENEW_BEFORE)
        return token, int(now) + seconds

    def _form(self) -> Mapping[str, str]:
        return {
            "grant_type": _GRANT,
            "client_id": self._file.client_id,
            "client_assertion_type": _ASSERTION_TYPE,
            "client_assertion": self._file.assertion(),
            "scope": f"{self._file.audience}/.default",
        }


def issued_token(body: Mapping[str, object], url: str) -> tuple[str, int]:
    """The access token in the body of an answer, and its lifetime in seconds.

    :param url: the vault's, for the error.
    :raise KeyProviderUnavailableError: When the body has no access token.
    """
    token, seconds = body.get("access_token"), body.get("expires_in")
    if (
        not isinstance(token, str)
        or not _TOKEN.fullmatch(token)
        or not isinstance(seconds, int)
        or seconds not in _LIFETIMES
    ):
        raise KeyProviderUnavailableError(f"the key vault {url} gave no token")
    return token, seconds


class AsyncVaultCredential:
    """A :class:`VaultCredential` for the SDK's asynchronous clients; requests run in a thread."""

    def __init__(self, credential: VaultCredential) -> None:
        self._credential = credential

    async def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **_others: object
    ) -> AccessToken:
        """As :meth:`VaultCredential.get_token`."""
        return await asyncio.to_thread(
            self._credential.get_token, *scopes, claims=claims, tenant_id=tenant_id
        )

    async def close(self) -> None:
        """Do nothing: the owner of the :class:`VaultCredential` closes it."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.close()
