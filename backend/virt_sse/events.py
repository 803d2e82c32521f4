"""What observers of key use are told."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from virt_sse.keys import DekContext, KeyId, KeyRef


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
    """

    action: KeyAction
    key: KeyId | KeyRef
    context: DekContext | None = None
    error: str | None = None
