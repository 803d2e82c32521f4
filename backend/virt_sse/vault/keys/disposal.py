"""Destroying key material outside the vault's database: none is forgotten, none in use is destroyed.

A row in ``leftovers`` is written before material is made, and in the transaction that deletes a version, so
the next start finds material left by a kill. Only material listed there is ever destroyed. Other objects in
an HSM token are left alone, even with this vault's label: the database may be an older copy, put back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping

from virt_sse.vault.keys.material import Protection
from virt_sse.vault.keys.records import Leftover
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.refusals import FailureRefusal, Refusal

_log = logging.getLogger(__name__)


class Disposal:
    """Destroys material without a version. Thread-safe, for one process only.

    :param protections: the protection backends outside the database, by ``kty``.
    """

    def __init__(self, store: KeyStore, protections: Mapping[str, Protection]) -> None:
        self._store = store
        self._protections = protections
        self._being_made: set[Leftover] = set()
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def making(self, leftover: Leftover) -> Iterator[None]:
        """Protect material from :meth:`sweep` while it is made and its version added; destroy it on failure.

        :raise Refusal: When the database cannot be written.
        """
        with self._lock:
            self._being_made.add(leftover)
        try:
            self._store.announce(leftover)
            yield
        except BaseException:
            self._made(leftover)
            self._attempt(leftover)
            raise
        self._made(leftover)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the destruction of material."""
        with self._lock:
            yield

    def sweep(self) -> None:
        """Destroy leftover material. Failures are logged and retried by the next sweep."""
        try:
            found = self._store.leftovers()
        except Refusal as refusal:
            _log.warning("cannot list leftover key material: %s", _why(refusal))
            return
        for leftover in found:
            self._attempt(leftover)

    def _made(self, leftover: Leftover) -> None:
        with self._lock:
            self._being_made.discard(leftover)

    def _attempt(self, leftover: Leftover) -> None:
        protection = self._protections.get(leftover.key_type)
        try:
            with self._lock:
                if (
                    protection is not None
                    and leftover not in self._being_made
                    and self._store.is_left_over(leftover)
                ):
                    protection.destroy(leftover.name, leftover.version)
                    self._store.forget(leftover)
        except Refusal as refusal:
            _log.warning(
                "leftover material of key %s/%s is not destroyed yet: %s",
                *(leftover.name, leftover.version, _why(refusal)),
            )


def _why(refusal: Refusal) -> str:
    return refusal.detail if isinstance(refusal, FailureRefusal) else refusal.message
