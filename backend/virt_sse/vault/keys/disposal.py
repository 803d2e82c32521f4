"""Destroying key material outside the vault's database: none is forgotten, none in use is destroyed.

A row in ``leftovers`` is written before material is made, and in the transaction that deletes a version, so
that material left by a kill is found. Only material listed there is ever destroyed. Other objects in an HSM
token are left alone, even with this vault's label: the database may be an older copy, put back.

Instances share the list. Material is destroyed inside a transaction, while no instance can add the version;
and a version is added only while its material is still listed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping

from virt_sse.vault.keys.material import Protection
from virt_sse.vault.keys.records import Leftover
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.refusals import FailureRefusal, Refusal

_log = logging.getLogger(__name__)

_MAKING_SECONDS = 600
"""How long an instance may take to make material, and how far the clocks of instances may be apart."""


class Disposal:
    """Destroys material without a version. Thread-safe.

    :param protections: the protection backends outside the database, by ``kty``.
    :param clock: seconds since 1970.
    """

    def __init__(
        self, store: KeyStore, protections: Mapping[str, Protection], clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._protections = protections
        self._clock = clock

    @contextlib.contextmanager
    def making(self, leftover: Leftover) -> Iterator[None]:
        """List material as leftover while it is made and its version added; destroy it on failure.

        :raise Refusal: When the database cannot be written.
        """
        self._store.announce(leftover, int(self._clock()))
        try:
            yield
        except BaseException:
            self._attempt(leftover, before=None)
            raise

    def sweep(self, *, alone: bool = False) -> None:
        """Destroy leftover material. Failures are logged and retried by the next sweep.

        :param alone: whether no material is being made now, by any instance.
        """
        before = None if alone else int(self._clock()) - _MAKING_SECONDS
        try:
            found = self._store.leftovers(before)
        except Refusal as refusal:
            _log.warning("cannot list leftover key material: %s", _why(refusal))
            return
        for leftover in found:
            self._attempt(leftover, before=before)

    def _attempt(self, leftover: Leftover, *, before: int | None) -> None:
        protection = self._protections.get(leftover.key_type)
        if protection is None:
            return
        try:
            protection.require()  # an HSM that does not answer must not block the vault's changes
            self._store.dispose(leftover, before, lambda: protection.destroy(leftover.name, leftover.version))
        except Refusal as refusal:
            _log.warning(
                "leftover material of key %s/%s is not destroyed yet: %s",
                *(leftover.name, leftover.version, _why(refusal)),
            )


def _why(refusal: Refusal) -> str:
    return refusal.detail if isinstance(refusal, FailureRefusal) else refusal.message
