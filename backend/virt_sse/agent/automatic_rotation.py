"""Disks of encryption sets that follow a new version of their key by themselves."""

from __future__ import annotations

import logging
import threading
from uuid import UUID

from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.errors import VirtSseError
from virt_sse.model.encryption_sets import EncryptionSet

_log = logging.getLogger(__name__)


class AutomaticRotation:
    """Looks for new versions again and again, in a thread of its own.

    :param seconds: between two looks.
    """

    def __init__(self, backend: Backend, metrics: Metrics, seconds: float) -> None:
        self._backend = backend
        self._metrics = metrics
        self._seconds = seconds
        self._stop = threading.Event()
        self._whole: set[UUID] = set()
        self._thread = threading.Thread(target=self._run, name="rotation", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A rotation under way may be cut off: the next run goes on with it."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for encryption_set in self._backend.sets.all():
                    if encryption_set.automatic_rotation and not self._stop.is_set():
                        self._follow(encryption_set)
            except VirtSseError as exc:
                _log.warning("rotation-failed", extra=fields({"reason": str(exc)}))
            except Exception:  # noqa: BLE001 -- it is tried again
                _log.exception("rotation-failed")
            self._stop.wait(self._seconds)

    def _follow(self, encryption_set: EncryptionSet) -> None:
        """Rewrap a set's disks if its key has a new version, or an earlier rewrap may have been cut off."""
        details: dict[str, object] = {"encryption-set": encryption_set.name}
        try:
            disks = self._backend.sets.disks(encryption_set.name)
            if not disks:
                return
            wanted = self._backend.sets.wanted_key(encryption_set)
        except VirtSseError as exc:
            _log.warning("rotation-failed", extra=fields(details | {"reason": str(exc)}))
            return
        current = all(disk.deks and disk.deks[0].wrapped.key == wanted for disk in disks)
        if current and encryption_set.id in self._whole:
            return
        report = self._backend.sets.rotate(str(encryption_set.id))
        if report.failed:
            self._whole.discard(encryption_set.id)
            _log.warning("rotation-failed", extra=fields(details | {"failed": report.failed}))
        else:
            self._whole.add(encryption_set.id)
        if report.rewrapped:
            self._metrics.rewrapped.inc(report.rewrapped)
            _log.info("rotated", extra=fields(details | {"key": str(wanted), "disks": report.rewrapped}))
