"""A cache of opened key versions."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from virt_sse.vault.keys.material import KeyMaterial
from virt_sse.vault.keys.records import KeyVersion


@dataclass(frozen=True, slots=True)
class OpenedKey:
    """A key version with its opened material."""

    record: KeyVersion
    material: KeyMaterial


class OpenedKeys:
    """At most *bound* opened versions; the least recently used version is dropped first.

    Entries read before a change are not kept after :meth:`forget`: disabling takes effect at once.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._entries: OrderedDict[tuple[str, str], OpenedKey] = OrderedDict()
        self._changes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str, version: str, opened: Callable[[], OpenedKey]) -> OpenedKey:
        """Return a version, opened by *opened* if necessary; failures of *opened* are not cached.

        :param name: in lower case.
        :param version: empty for the newest version.
        """
        slot = (name, version)
        with self._lock:
            entry = self._entries.get(slot)
            if entry is not None:
                self._entries.move_to_end(slot)
                return entry
            before = self._changes
        entry = opened()
        with self._lock:
            if self._changes == before:
                self._entries[slot] = entry
                while len(self._entries) > self._bound:
                    self._entries.popitem(last=False)
        return entry

    def forget(self, name: str) -> None:
        """Drop all versions of a key, given in lower case, after a change."""
        with self._lock:
            self._changes += 1
            for slot in [slot for slot in self._entries if slot[0] == name]:
                del self._entries[slot]

    def forget_all(self) -> None:
        """Drop all versions of all keys, after a change by another instance."""
        with self._lock:
            self._changes += 1
            self._entries.clear()
