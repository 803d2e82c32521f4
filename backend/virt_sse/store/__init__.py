"""The store: an index of all disks and their wrapped DEKs. Never holds a DEK in the clear."""

from virt_sse.store.store import Store

__all__ = ["Store"]
