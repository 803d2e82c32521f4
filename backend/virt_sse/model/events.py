"""What observers of key use are told, and what belongs to a use without being asked of the key."""

from __future__ import annotations

import contextlib
import enum
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from virt_sse.model.keys import DekContext, KeyId, KeyRef


class KeyAction(enum.Enum):
    """What was asked of the key."""

    WRAP = "wrap"
    UNWRAP = "unwrap"
    ROTATE = "rotate"


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """One use of a KEK, allowed or refused.

    :ivar key: without a version for ``ROTATE``, which makes one.
    :ivar context: the disk and slot whose DEK it was; ``None`` for the key's own life.
    :ivar error: ``None`` when it was allowed, else the provider's reason.
    :ivar correlation: the same as in the audit log.
    :ivar seconds: how long the provider took.
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
    """What a key provider sends along, so that its server's records can be matched with ours.

    Set while a provider is called, in the thread that it is called in.
    """
    return _correlation.get()


def current_domain() -> str | None:
    """The domain that keys are used for, if they are used for one."""
    return _domain.get()


@contextlib.contextmanager
def correlated() -> Iterator[uuid.UUID]:
    """One use of a key: gives it a correlation id."""
    token = _correlation.set(correlation := uuid.uuid4())
    try:
        yield correlation
    finally:
        _correlation.reset(token)


@contextlib.contextmanager
def audit_context(*, domain: str) -> Iterator[None]:
    """Every use of a key in here is for *domain*."""
    token = _domain.set(domain)
    try:
        yield
    finally:
        _domain.reset(token)
