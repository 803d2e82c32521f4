"""Logins to Vault and OpenBao servers: by AppRole, and by TLS certificate; the tokens, and their renewal."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Self

from virt_sse.api import KeyDeniedError, KeyProviderUnavailableError, VirtSseError
from virt_sse.vault_client.deadlines import remaining
from virt_sse.vault_client.exchange import tls_context
from virt_sse.vault_client.secret_files import read_secret_file
from virt_sse_plugins.key_providers.transit_answers import TransitAnswer
from virt_sse_plugins.key_providers.transit_options import TransitOptions

Send = Callable[[str, str, "bytes | None", "str | None"], TransitAnswer]
"""Sends a request: method, path below ``/v1/``, body, token."""

_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}", re.ASCII)
_LONGEST_LEASE = 10 * 366 * 86400
_REFUSED_SECONDS = 960.0
"""Pause before a refused secret_id is tried again; by default, five failures within 15 minutes of each other
lock the role out, also for a new secret_id."""
_RENEW_BEFORE = 1 / 3
"""Fraction of a token's lifetime; with less than this left, the token is renewed."""


@dataclass(frozen=True, slots=True)
class TransitToken:
    """A token of the server.

    :ivar value: for the header ``X-Vault-Token``.
    :ivar expires: of ``time.monotonic()``; infinite for a token without an end.
    :ivar renew_at: when to renew, of ``time.monotonic()``.
    :ivar renewable: whether the server extends this token.
    :ivar revocable: whether the server keeps the token, unlike a batch token.
    :ivar lease: its lifetime when issued or renewed, in seconds.
    """

    value: str = field(repr=False)
    expires: float
    renew_at: float
    renewable: bool
    revocable: bool
    lease: int

    @classmethod
    def of(cls, answer: TransitAnswer, asked: float) -> Self | None:
        """The token in the answer to a login or renewal; ``None`` if there is none.

        :param asked: when the request was sent, of ``time.monotonic()``.
        """
        auth = answer.body.get("auth")
        if answer.status != HTTPStatus.OK or not isinstance(auth, dict):
            return None
        value, lease = auth.get("client_token"), auth.get("lease_duration")
        if not isinstance(value, str) or not _TOKEN.fullmatch(value):
            return None
        if isinstance(lease, bool) or not isinstance(lease, int) or not 0 <= lease <= _LONGEST_LEASE:
            return None
        return cls(
            value,
            expires=asked + lease if lease else math.inf,
            renew_at=asked + lease * (1 - _RENEW_BEFORE) if lease else math.inf,
            renewable=auth.get("renewable") is True,
            revocable=auth.get("token_type") != "batch",
            lease=lease,
        )


@dataclass(frozen=True, slots=True)
class _RefusedLogin:
    """Credentials that the server has refused.

    :ivar digest: SHA-256 of the credentials.
    :ivar until: when to try them again, of ``time.monotonic()``.
    """

    digest: bytes = b""
    until: float = 0.0
    reason: str = ""


class TransitLogin:
    """One identity at a server, and its current token. Thread-safe, also after a fork."""

    def __init__(self, options: TransitOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._token: TransitToken | None = None
        self._refused = _RefusedLogin()

    def who(self) -> str:
        """Description of the identity, for messages."""
        return f"the login by {self._options.login_path.removesuffix('/login')}"

    def stamp(self) -> object:
        """A value that changes when a file used by :meth:`context` is replaced."""
        options = self._options
        return [_stamp(path) for path in (options.ca, options.certificate, options.private_key) if path]

    def context(self) -> ssl.SSLContext:
        """TLS for all requests: trust in the server's authority, and the client's certificate, if any.

        :raise KeyProviderUnavailableError: When a file cannot be read, or is open to other users.
        """
        options = self._options
        try:
            context = tls_context(Path(options.ca).read_text("ascii") if options.ca else None)
        except (OSError, ValueError) as exc:  # includes ssl.SSLError
            raise KeyProviderUnavailableError(f"cannot read certificates from {options.ca}") from exc
        if options.certificate and options.private_key:
            _read(options.private_key, "private key")
            try:
                context.load_cert_chain(options.certificate, options.private_key, password=lambda: "")
            except (OSError, ValueError) as exc:
                raise KeyProviderUnavailableError(
                    f"cannot use the certificate {options.certificate} with the key {options.private_key}"
                ) from exc
        return context

    def token(self, send: Send) -> TransitToken:
        """The current token: renewed, or issued by a login, if necessary.

        :raise KeyDeniedError: When the server refuses the login.
        :raise KeyProviderUnavailableError: When the server does not answer, or the secret_id cannot be read.
        """
        token = self._token
        if token is not None and time.monotonic() < token.renew_at:
            return token
        with self._locked():
            token, now = self._token, time.monotonic()
            if token is None or now >= token.expires:
                self._token = self._log_in(send)
            elif now >= token.renew_at:
                with contextlib.suppress(KeyProviderUnavailableError):  # the token is still valid
                    self._token = self._renewed(send, token) or self._log_in(send)
            return self._token  # type: ignore[return-value] # set above

    def replace(self, send: Send, refused: TransitToken) -> TransitToken | None:
        """A new token in place of a refused token; ``None`` if the server knows the refused token.

        :raise: As :meth:`token`.
        """
        with self._locked():
            if self._token is not None and self._token is not refused:
                return self._token
            answer = send("GET", "auth/token/lookup-self", None, refused.value)
            if answer.status == HTTPStatus.OK:
                return None
            if not answer.is_denial:
                raise answer.unavailable()
            self._token = None
            self._token = self._log_in(send)
            return self._token

    def drop(self) -> TransitToken | None:
        """Forget the token; returns the token for revocation, if this process made it."""
        token, self._token = self._token, None
        return token if token is not None and token.revocable and self._owner == os.getpid() else None

    def _locked(self) -> _Locked:
        return _Locked(self._lock)

    def _log_in(self, send: Send) -> TransitToken:
        credentials, asked = self._credentials(), time.monotonic()
        digest = hashlib.sha256(credentials).digest()
        if digest == self._refused.digest and asked < self._refused.until:
            raise self._refusal(self._refused.reason)
        answer = send("POST", self._options.login_path, credentials, None)
        token = TransitToken.of(answer, asked)
        if token is not None:
            self._owner = os.getpid()
            return token
        if answer.is_rejection and self._options.secret_id_file:
            self._refused = _RefusedLogin(digest, asked + _REFUSED_SECONDS, answer.reason())
        if answer.is_denial or answer.is_rejection or answer.is_absence:
            raise self._refusal(answer.reason())
        raise answer.unavailable()

    def _refusal(self, reason: str) -> KeyDeniedError:
        return KeyDeniedError(
            f"key vault refused {self.who()}{reason}",
            hint="the role, the secret_id or the auth method was deleted, or the certificate is refused",
        )

    def _renewed(self, send: Send, token: TransitToken) -> TransitToken | None:
        """The token with a new lease; ``None`` if the server extends the lease by less than half, or not."""
        if not token.renewable:
            return None
        asked = time.monotonic()
        renewed = TransitToken.of(send("POST", "auth/token/renew-self", b"{}", token.value), asked)
        if renewed is None or renewed.value != token.value or renewed.lease < token.lease / 2:
            return None
        return renewed

    def _credentials(self) -> bytes:
        options = self._options
        document: Mapping[str, str] = {"name": options.role} if options.role else {}
        if options.role_id and options.secret_id_file:
            secret_id = _read(options.secret_id_file, "file with the secret_id").strip()
            if not _TOKEN.fullmatch(secret_id):
                raise KeyProviderUnavailableError(f"{options.secret_id_file} has no secret_id")
            document = {"role_id": options.role_id, "secret_id": secret_id}
        return json.dumps(document).encode()


class _Locked:
    """A lock, waited for until the deadline: another thread may wait for a server that hangs.

    :raise KeyProviderUnavailableError: On entering, at the deadline.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        left = remaining()
        if not self._lock.acquire(timeout=-1 if left is None else left):
            raise KeyProviderUnavailableError("the key vault does not answer: timed out")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _stamp(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = Path(path).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _read(path: str, kind: str) -> str:
    """The content of a private file.

    :raise KeyProviderUnavailableError: When the file cannot be read: no verdict of the server.
    """
    try:
        return read_secret_file(Path(path), kind).decode("ascii", "replace")
    except VirtSseError as exc:
        raise KeyProviderUnavailableError(str(exc), hint=exc.hint) from exc
