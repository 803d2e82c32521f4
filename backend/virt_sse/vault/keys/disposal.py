"""Key material outside the vault's database: nothing of it is forgotten there, and nothing in use destroyed.

It is written down before it is made, and in the transaction that forgets a key: what a kill leaves, the next
start finds. Only what is written down so is ever destroyed. What else lies in a token, also with this vault's
label, is left alone: the database may be an older copy, put back.
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
    """Destroys the material that no version names. Threads may share one, processes not.

    :param protections: by ``kty``, who keeps material outside.
    """

    def __init__(self, store: KeyStore, protections: Mapping[str, Protection]) -> None:
        self._store = store
        self._protections = protections
        self._being_made: set[Leftover] = set()
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def making(self, leftover: Leftover) -> Iterator[None]:
        """While its material is made and its version is added; destroyed when that fails.

        :raise Refusal: When it cannot be written down.
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
        """While nothing is destroyed."""
        with self._lock:
            yield

    def sweep(self) -> None:
        """Destroy what is left over. What fails is logged, and tried again next time."""
        try:
            found = self._store.leftovers()
        except Refusal as refusal:
            _log.warning("cannot look for what is left of keys: %s", _why(refusal))
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
                "what is left of key %s/%s is not destroyed yet: %s",
                *(leftover.name, leftover.version, _why(refusal)),
            )


def _why(refusal: Refusal) -> str:
    return refusal.detail if isinstance(refusal, FailureRefusal) else refusal.message
