"""Locks of domains whose guests a command pauses for a moment."""

from __future__ import annotations

from virt_sse.config import Config
from virt_sse.system.locks import DiskLocks


def pause_locks(config: Config) -> DiskLocks:
    """Locks by the UUIDs of domains: a single command at a time pauses and resumes a guest.

    Otherwise the end of a pause for a disk would end the pause for another disk of the domain.
    """
    return DiskLocks(config.paused_domains.with_suffix(".lock"))
