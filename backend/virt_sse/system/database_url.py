"""URLs of databases, for code that does without SQLAlchemy."""

from __future__ import annotations

import re
from pathlib import Path

from virt_sse.errors import InvalidValueError

_SQLITE = "sqlite:///"
_POSTGRESQL = re.compile(r"postgresql(\+\w+)?://")
_PASSWORD = re.compile(r"[\w+]+://[^:/]*:[^@]+@|.*[?&](ssl)?password=", re.IGNORECASE)


def sqlite_url(path: object) -> str:
    """SQLAlchemy's URL of an SQLite file, with ``?`` and ``%`` escaped."""
    return _SQLITE + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_path(url: str) -> Path | None:
    """The file that :func:`sqlite_url` has named; ``None`` for other URLs, and for options or escapes."""
    path = url.removeprefix(_SQLITE)
    is_plain = path != url and path.startswith("/") and not set(path) & {"?", "%"}
    return Path(path) if is_plain else None


def is_postgresql(url: str) -> bool:
    """Whether *url* names a PostgreSQL database."""
    return _POSTGRESQL.match(url) is not None


def has_password(url: str) -> bool:
    """Whether *url* contains a password, before the host or among the options; errs towards true."""
    return not url.startswith("sqlite:") and _PASSWORD.match(url) is not None


def refuse_password(url: str) -> None:
    """Refuse a URL from a command line with a password.

    :raise InvalidValueError: When *url* has a password.
    """
    if has_password(url):
        raise InvalidValueError(
            "a password on the command line is visible to other users",
            hint="keep the password in a file, and name the file: …?passfile=/etc/virt-sse/pgpass",
        )
