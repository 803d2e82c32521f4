"""Audit records of requests."""

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

_NOBODY = "unknown"


@dataclass(frozen=True, slots=True)
class AuditedRequest:
    """What was asked of the vault, and by whom.

    :ivar actor: ``None`` when that is not known.
    :ivar key: the URL of the key, or of what else it is about, without a version.
    """

    action: str
    actor: str | None
    key: str
    version: str | None
    disk: UUID | None
    source: str
    correlation: UUID

    def by(self, principal: Principal) -> Self:
        """The same, asked by *principal*."""
        return dataclasses.replace(self, actor=f"{principal.name} ({principal.client_id})")


class Trail:
    """Writes the records.

    :param sink: where to.
    :param strangers: records a second about callers whom nobody knows: they must not fill the disk.
    """

    def __init__(self, sink: AuditSink, *, strangers: float = 10.0) -> None:
        self._sink = sink
        self._strangers = RateLimit(strangers, strangers)
        self._lock = threading.Lock()

    def requested(self, asked: AuditedRequest) -> None:
        """Record what is about to be done and cannot be taken back.

        :raise Refusal: When it cannot be recorded; it must not be done then.
        """
        self._append(asked, asked.version, Result.REQUESTED, None)

    def allowed(self, asked: AuditedRequest, version: str | None) -> None:
        """Record what was done.

        :param version: the one that was used, if the caller did not say which.
        :raise Refusal: When it cannot be recorded; it must not be answered then.
        """
        self._append(asked, version or asked.version, Result.ALLOWED, None)

    def refused(self, asked: AuditedRequest, refusal: Refusal) -> None:
        """Record what was not done.

        :raise Refusal: When it cannot be recorded.
        """
        if asked.actor is None:
            with self._lock:
                if self._strangers.take():
                    _log.warning("more refused strangers than are recorded, from %s", asked.source)
                    return
        self._append(asked, asked.version, Result.REFUSED, refusal.reason)

    def _append(self, asked: AuditedRequest, version: str | None, result: Result, reason: str | None) -> None:
        try:
            self._sink.append(
                AuditRecord(
                    component=Component.VAULT,
                    actor=asked.actor or _NOBODY,
                    action=asked.action,
                    key=asked.key,
                    key_version=version,
                    disk=asked.disk,
                    source=asked.source,
                    result=result,
                    reason=reason,
                    correlation=asked.correlation,
                )
            )
        except VirtSseError as exc:
            _log.error("%s", exc)
            raise unavailable(
                "The vault cannot record what is asked of it now, and so does not do it."
            ) from exc
