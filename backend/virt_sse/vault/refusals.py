"""What the vault answers when it will not: Azure's statuses, codes and inner codes.

``{"error": {"code": "Forbidden", "message": "…", "innererror": {"code": "KeyDisabled"}}}``
"""

from __future__ import annotations


class Refusal(Exception):
    """An HTTP answer that is not what was asked for.

    :ivar status: the HTTP status.
    :ivar code: Azure's error code.
    :ivar inner: its inner error's code, if it has one.
    :ivar retry_after: after how many seconds it may be asked again.
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
        """The most exact code there is: what the audit log keeps."""
        return self.inner or self.code

    def body(self) -> dict[str, object]:
        """The answer's body."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.inner is not None:
            error["innererror"] = {"code": self.inner}
        return {"error": error}


def bad_parameter(message: str) -> Refusal:
    """400: the request makes no sense."""
    return Refusal(400, "BadParameter", message)


def unauthorized(message: str) -> Refusal:
    """401: no token, or none that holds."""
    return Refusal(401, "Unauthorized", message)


def forbidden(message: str, inner: str) -> Refusal:
    """403: *inner* says why."""
    return Refusal(403, "Forbidden", message, inner=inner)


def key_not_found(name: str, version: str = "") -> Refusal:
    """404: no such key, or no such version."""
    what = f"{name}/{version}" if version else name
    return Refusal(
        404,
        "KeyNotFound",
        f"A key with (name/id) {what} was not found in this key vault.",
        inner="KeyNotFound",
    )


def conflict(message: str, inner: str | None = None) -> Refusal:
    """409: it stands in the way of what there is."""
    return Refusal(409, "Conflict", message, inner=inner)


def too_large(limit: int) -> Refusal:
    """413: a longer body than the vault reads."""
    return Refusal(413, "RequestBodyTooLarge", f"The request body is larger than {limit} bytes.")


def throttled(retry_after: int) -> Refusal:
    """429: more than the vault is set to take."""
    return Refusal(429, "Throttled", "Too many requests; ask again later.", retry_after=retry_after)


def unavailable(message: str) -> Refusal:
    """503: the vault cannot do it now; nothing was lost."""
    return Refusal(503, "ServiceUnavailable", message, retry_after=5)


class FailureRefusal(Refusal):
    """503: what the vault works with failed.

    :ivar detail: why, for the log: the caller is not told.
    """

    def __init__(self, message: str, detail: str) -> None:
        told = unavailable(message)
        super().__init__(told.status, told.code, told.message, retry_after=told.retry_after)
        self.detail = detail


def internal() -> Refusal:
    """500: what must not happen. The log has it, the answer has not."""
    return Refusal(500, "InternalServerError", "The vault failed.")
