"""The store: an index of all disks and their wrapped DEKs. Never contains an unwrapped DEK."""

from virt_sse.store.store import Store

__all__ = ["Store"]
