"""Who may see the page on the loopback socket: token, links, cookies, and checks of request headers.

The token is a secret in a file of root's. A link holds no token, but a code made with the token: the code is
valid for :data:`LINK_SECONDS` and once, and is exchanged for a cookie. The cookie is derived from the token:
another token ends all sessions.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from virt_sse.errors import AgentError
from virt_sse.system.files import private_folder, write_new

COOKIE = "virt-sse-page"
LINK_SECONDS = 600
_TOKEN_BYTES = 32
_TOKEN = re.compile(r"[0-9a-f]{64}")
_CODE = re.compile(r"(\d{1,12})\.([0-9a-f]{32})\.([0-9a-f]{64})", re.ASCII)
_LOOPBACK_NAMES = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?", re.ASCII)
_MOST_CODES = 10_000


def provided_token(path: Path) -> str:
    """The token in the file *path*, mode 0600; made if missing.

    :raise AgentError: When the file cannot be read or made, belongs to another user, or is open to others.
    """
    try:
        if not path.exists():
            private_folder(path.parent)
            write_new(path, secrets.token_hex(_TOKEN_BYTES).encode() + b"\n")
    except FileExistsError:
        pass
    except OSError as exc:
        raise AgentError(f"cannot write {path}: {exc.strerror}") from exc
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in the file *path*.

    :raise AgentError: As for :func:`provided_token`, or when there is no token yet.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(1 << 10).decode("ascii", "replace").strip()
    except FileNotFoundError as exc:
        raise AgentError(
            f"{path} is missing", hint="the agent makes the file: systemctl restart virt-sse-agent"
        ) from exc
    except OSError as exc:
        raise AgentError(f"cannot read {path}: {exc.strerror}") from exc
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise AgentError(f"{path} is open to other users", hint=f"remove {path}: it may be known to others")
    if not _TOKEN.fullmatch(text):
        raise AgentError(f"{path} holds no token", hint=f"remove {path}, and restart the agent")
    return text


def new_code(token: str, now: float | None = None) -> str:
    """A new code for a link."""
    until = int(time.time() if now is None else now) + LINK_SECONDS
    text = f"{until}.{secrets.token_hex(16)}"
    return f"{text}.{_mac(token, f'code {text}')}"


class Sessions:
    """Checks codes, cookies and the token, in constant time.

    :param clock: seconds since 1970, as of ``time.time()``.
    """

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self._token = token
        self._clock = clock
        self._used: dict[str, int] = {}
        self.cookie = _mac(token, "cookie")
        """The cookie's value."""

    def redeem(self, code: str) -> bool:
        """Whether *code* is valid; afterwards, the code is invalid."""
        match = _CODE.fullmatch(code)
        if not match:
            return False
        now, until = self._clock(), int(match[1])
        authentic = hmac.compare_digest(match[3], _mac(self._token, f"code {match[1]}.{match[2]}"))
        self._used = {each: end for each, end in self._used.items() if end >= now}
        if not authentic or not now <= until <= now + LINK_SECONDS or match[2] in self._used:
            return False
        if len(self._used) >= _MOST_CODES:
            return False
        self._used[match[2]] = until
        return True

    def admits(self, cookie: str | None, authorization: str | None) -> bool:
        """Whether a request has the cookie, or the token as a bearer token (RFC 6750 §2.1)."""
        kind, _, token = (authorization or "").partition(" ")
        by_token = kind.lower() == "bearer" and _same(token.strip(), self._token)
        return by_token or _same(cookie or "", self.cookie)


def is_loopback_name(host: str | None) -> bool:
    """Whether a ``Host`` header names this host's loopback: any other name may be a rebound DNS name."""
    return host is not None and _LOOPBACK_NAMES.fullmatch(host.lower()) is not None


def _mac(token: str, text: str) -> str:
    return hmac.new(token.encode(), f"virt-sse page {text}".encode(), hashlib.sha256).hexdigest()


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
