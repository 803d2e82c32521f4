"""Why a server did not answer, in the same words for every client and SDK."""

from __future__ import annotations

import ssl
from collections.abc import Iterator


def failure_reason(failure: Exception) -> str:
    """Why a request had no answer, by the cause that tells most. Shows nothing of the request."""
    chain = list(causes(failure))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"no TLS connection: {cause.reason}"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return "timed out"
        if isinstance(cause, ConnectionError):
            return cause.strerror or "the connection was lost"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return type(chain[-1]).__name__


def causes(failure: BaseException) -> Iterator[BaseException]:
    """The failure and its causes, also those that Azure's SDK keeps in attributes."""
    seen: set[int] = set()
    while id(failure) not in seen:
        seen.add(id(failure))
        yield failure
        inner = getattr(failure, "inner_exception", None) or failure.__cause__ or failure.__context__
        if isinstance(inner, BaseException):
            failure = inner
