"""Key events for observers, and the ambient context of a key use: correlation id and domain."""

from __future__ import annotations

import contextlib
import enum
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from virt_sse.model.keys import DekContext, KeyId, KeyRef


class KeyAction(enum.Enum):
    """The operation requested of a key."""

    WRAP = "wrap"
    UNWRAP = "unwrap"
    ROTATE = "rotate"


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """An allowed or refused use of a KEK.

    :ivar key: without a version for ``ROTATE``, which creates a version.
    :ivar context: disk and slot of the DEK; ``None`` for operations on the key itself.
    :ivar error: the provider's reason for a refusal; ``None`` when the use was allowed.
    :ivar correlation: the correlation id of the audit record.
    :ivar seconds: duration of the provider's call.
    """

    action: KeyAction
    key: KeyId | KeyRef
    context: DekContext | None = None
    error: str | None = None
    correlation: uuid.UUID = field(default_factory=uuid.uuid4)
    seconds: float = 0.0


_correlation: ContextVar[uuid.UUID | None] = ContextVar("correlation", default=None)
_domain: ContextVar[str | None] = ContextVar("domain", default=None)


def current_correlation() -> uuid.UUID | None:
    """The correlation id that a key provider sends along, to match its server's records with our audit log.

    Set during a call of a provider, in the calling thread.
    """
    return _correlation.get()


def current_domain() -> str | None:
    """The domain on whose behalf keys are used, or ``None``."""
    return _domain.get()


@contextlib.contextmanager
def correlated() -> Iterator[uuid.UUID]:
    """Assign a new correlation id to the key use within the block."""
    token = _correlation.set(correlation := uuid.uuid4())
    try:
        yield correlation
    finally:
        _correlation.reset(token)


@contextlib.contextmanager
def audit_context(*, domain: str) -> Iterator[None]:
    """Attribute all key uses within the block to *domain*."""
    token = _domain.set(domain)
    try:
        yield
    finally:
        _domain.reset(token)
