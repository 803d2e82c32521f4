"""Answers of Vault and OpenBao servers, by meaning. Only known words of an answer appear in messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self

from virt_sse.api import KeyProviderUnavailableError
from virt_sse.vault_client.exchange import document_of

_KNOWN = (
    "sealed",
    "not initialized",
    "standby",
    "rate limit",
    "quota",
    "invalid role or secret id",
    "invalid secret id",
    "invalid role id",
    "invalid token",
    "no handler for route",
    "namespace not found",
    "permission denied",
    "key not found",
    "too old",
    "authentication failed",
    "invalid ciphertext",
)
"""Words of servers' messages, in lower case; the most specific first."""


@dataclass(frozen=True, slots=True)
class TransitAnswer:
    """An answer of a server.

    :ivar url: of the server.
    :ivar body: the JSON object; may contain a token or a DEK, therefore not in the repr.
    """

    url: str
    status: int
    body: Mapping[str, object] = field(repr=False)

    @classmethod
    def of(cls, url: str, status: int, content: bytes) -> Self:
        """The answer with this content."""
        return cls(url, status, document_of(content))

    @property
    def is_genuine(self) -> bool:
        """Whether the body is that of a server's error, unlike a proxy's page."""
        errors = self.body.get("errors")
        return isinstance(errors, list) and all(isinstance(each, str) for each in errors)

    @property
    def is_success(self) -> bool:
        """Whether the server did as asked."""
        return self.status == HTTPStatus.NO_CONTENT or (
            self.status == HTTPStatus.OK and isinstance(self.body.get("data"), dict)
        )

    @property
    def is_denial(self) -> bool:
        """Whether the server refuses this token or this client."""
        return self.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) and self.is_genuine

    @property
    def is_rejection(self) -> bool:
        """Whether the server considers the request invalid."""
        return self.status == HTTPStatus.BAD_REQUEST and self.is_genuine

    @property
    def is_absence(self) -> bool:
        """Whether the server has nothing at this path."""
        return self.status == HTTPStatus.NOT_FOUND and self.is_genuine

    @property
    def data(self) -> Mapping[str, object]:
        """The result; may contain a DEK."""
        found = self.body.get("data")
        return found if isinstance(found, dict) else {}

    def reason(self) -> str:
        """Status and known words of the answer, in parentheses after a space."""
        errors = self.body.get("errors")
        said = " ".join(str(each) for each in errors).lower() if isinstance(errors, list) else ""
        word = next((known for known in _KNOWN if known in said), "")
        return f" ({self.status} {word})" if word else f" ({self.status})"

    def unavailable(self) -> KeyProviderUnavailableError:
        """The error for an answer without a verdict on the key."""
        if self.is_genuine or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return KeyProviderUnavailableError(f"the key vault {self.url} cannot answer now{self.reason()}")
        return KeyProviderUnavailableError(
            f"{self.url} does not answer like a Vault or OpenBao server ({self.status})"
        )
