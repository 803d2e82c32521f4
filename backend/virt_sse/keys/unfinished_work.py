"""Work that killed commands left unfinished, as far as a look at the store and at the marks can tell."""

from __future__ import annotations

from virt_sse.config import Config
from virt_sse.store import StoreReads
from virt_sse.system.marks import Marks


def has_unfinished_work(config: Config, store: StoreReads) -> bool:
    """Whether the backend, once opened, may find work to finish or undo.

    :raise StoreError: When the store cannot be read.
    """
    marks = (config.pending_envelopes, config.pending_resizes, config.paused_domains)
    is_marked = any(Marks(folder).all() for folder in marks) or any(config.new_domains.glob("*.json"))
    return is_marked or bool(store.unfinished())
