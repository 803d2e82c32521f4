"""The vault's error responses: Azure's statuses, codes and inner codes.

``{"error": {"code": "Forbidden", "message": "…", "innererror": {"code": "KeyDisabled"}}}``
"""

from __future__ import annotations


class Refusal(Exception):
    """An HTTP error response.

    :ivar status: the HTTP status.
    :ivar code: Azure's error code.
    :ivar inner: the code of the inner error, if any.
    :ivar retry_after: seconds until the client may retry.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        inner: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.inner = inner
        self.retry_after = retry_after

    @property
    def reason(self) -> str:
        """The most specific code, for the audit log."""
        return self.inner or self.code

    def body(self) -> dict[str, object]:
        """Build the response's body."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.inner is not None:
            error["innererror"] = {"code": self.inner}
        return {"error": error}


def bad_parameter(message: str) -> Refusal:
    """400: the request is invalid."""
    return Refusal(400, "BadParameter", message)


def unauthorized(message: str) -> Refusal:
    """401: no access token, or an invalid access token."""
    return Refusal(401, "Unauthorized", message)


def forbidden(message: str, inner: str) -> Refusal:
    """403, with the reason in *inner*."""
    return Refusal(403, "Forbidden", message, inner=inner)


def key_not_found(name: str, version: str = "") -> Refusal:
    """404: the key or the version does not exist."""
    named = f"{name}/{version}" if version else name
    return Refusal(
        404,
        "KeyNotFound",
        f"A key with (name/id) {named} was not found in this key vault.",
        inner="KeyNotFound",
    )


def conflict(message: str, inner: str | None = None) -> Refusal:
    """409: the request conflicts with the state of the vault."""
    return Refusal(409, "Conflict", message, inner=inner)


def too_large(limit: int) -> Refusal:
    """413: the body is longer than the vault's limit."""
    return Refusal(413, "RequestBodyTooLarge", f"The request body is larger than {limit} bytes.")


def throttled(retry_after: int) -> Refusal:
    """429: the request exceeds the vault's configured limits."""
    return Refusal(429, "Throttled", "Too many requests; ask again later.", retry_after=retry_after)


def unavailable(message: str) -> Refusal:
    """503: a temporary failure of the vault; no data is lost."""
    return Refusal(503, "ServiceUnavailable", message, retry_after=5)


class FailureRefusal(Refusal):
    """503: a component of the vault failed.

    :ivar detail: the reason, for the log only; the client's message does not contain the detail.
    """

    def __init__(self, message: str, detail: str) -> None:
        base = unavailable(message)
        super().__init__(base.status, base.code, base.message, retry_after=base.retry_after)
        self.detail = detail


def internal() -> Refusal:
    """500: a bug. Details go to the log, never to the client."""
    return Refusal(500, "InternalServerError", "The vault failed.")
