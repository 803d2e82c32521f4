"""Audit records of requests to the vault."""

from __future__ import annotations

import dataclasses
import logging
import threading
from dataclasses import dataclass
from typing import Self
from uuid import UUID

from virt_sse.audit.record import AuditRecord, Component, Result
from virt_sse.errors import VirtSseError
from virt_sse.vault.identity.principals import Principal
from virt_sse.vault.rate_limit import RateLimit
from virt_sse.vault.refusals import Refusal, unavailable
from virt_sse.vault.vault import AuditSink

_log = logging.getLogger(__name__)

LOGGER = _log.name

_UNAUTHENTICATED = "unknown"


@dataclass(frozen=True, slots=True)
class AuditedRequest:
    """A request, as recorded in the audit log.

    :ivar actor: the caller; ``None`` before authentication.
    :ivar key: the URL of the key, or of another object of the request, without a version.
    """

    action: str
    actor: str | None
    key: str
    version: str | None
    disk: UUID | None
    source: str
    correlation: UUID

    def by(self, principal: Principal) -> Self:
        """Return a copy with *principal* as the caller."""
        return dataclasses.replace(self, actor=f"{principal.name} ({principal.client_id})")


class Trail:
    """Writes audit records.

    :param sink: the audit log.
    :param unauthenticated_rate: maximum of records a second about unauthenticated callers, who could fill
        the disk otherwise.
    """

    def __init__(self, sink: AuditSink, *, unauthenticated_rate: float = 10.0) -> None:
        self._sink = sink
        self._unauthenticated = RateLimit(unauthenticated_rate, unauthenticated_rate)
        self._lock = threading.Lock()

    def requested(self, request: AuditedRequest) -> None:
        """Record an irreversible operation before its start.

        :raise Refusal: When the record cannot be written; the operation must not be started then.
        """
        self._append(request, request.version, Result.REQUESTED, None)

    def allowed(self, request: AuditedRequest, version: str | None) -> None:
        """Record a completed operation.

        :param version: the key version used, when the request did not name a version.
        :raise Refusal: When the record cannot be written; the result must not be sent then.
        """
        self._append(request, version or request.version, Result.ALLOWED, None)

    def refused(self, request: AuditedRequest, refusal: Refusal) -> None:
        """Record a refused request.

        :raise Refusal: When the record cannot be written.
        """
        if request.actor is None:
            with self._lock:
                if self._unauthenticated.take():
                    _log.warning(
                        "too many refused unauthenticated requests to record, from %s", request.source
                    )
                    return
        self._append(request, request.version, Result.REFUSED, refusal.reason)

    def _append(
        self, request: AuditedRequest, version: str | None, result: Result, reason: str | None
    ) -> None:
        try:
            self._sink.append(
                AuditRecord(
                    component=Component.VAULT,
                    actor=request.actor or _UNAUTHENTICATED,
                    action=request.action,
                    key=request.key,
                    key_version=version,
                    disk=request.disk,
                    source=request.source,
                    result=result,
                    reason=reason,
                    correlation=request.correlation,
                )
            )
        except VirtSseError as exc:
            _log.error("%s", exc)
            raise unavailable(
                "The vault cannot record requests in its audit log now, and therefore refuses them."
            ) from exc
