"""Goes on with copies of disks whose command has ended, and settles copies of killed commands."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from uuid import UUID

from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.errors import CopyInterruptedError, VirtSseError
from virt_sse.model.replacements import Replacement, ReplacementState

_log = logging.getLogger(__name__)

_THREADS = 4
"""Copies at the same time; further copies wait."""
_AGAIN_SECONDS = 10.0


class ReplacementWatch:
    """Does the agent's part of copies in threads of its own."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._jobs: dict[UUID, Future[None]] = {}
        self._not_before: dict[UUID, float] = {}
        self._complaints: dict[UUID, str] = {}
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="copy")

    def keep(self) -> None:
        """Start the work on all recorded copies that no other process works on.

        :raise StoreError: When the store cannot be queried.
        """
        now = time.monotonic()
        for copy in self._backend.host.store.replacements.all():
            job = self._jobs.get(copy.disk_id)
            is_due = now >= self._not_before.get(copy.disk_id, 0.0)
            if copy.state is not ReplacementState.KEPT and is_due and (job is None or job.done()):
                self._jobs[copy.disk_id] = self._pool.submit(self._work, copy)

    def stop(self) -> None:
        """Leave all copies as they are; QEMU continues under running guests, and the next agent goes on."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def _work(self, copy: Replacement) -> None:
        details: dict[str, object] = {"disk": copy.name, "copy": copy.disk_id}
        try:
            done = self._backend.reencryption.continue_detached(copy, self._stopping)
        except CopyInterruptedError:
            return
        except VirtSseError as exc:
            self._not_before[copy.disk_id] = time.monotonic() + _AGAIN_SECONDS
            if self._complaints.get(copy.disk_id) != str(exc):
                self._complaints[copy.disk_id] = str(exc)
                self._metrics.failed_actions.labels("copy").inc()
                _log.warning("copy-failed", extra=fields(details | {"reason": str(exc)}))
        except Exception:  # noqa: BLE001 -- one copy must not stop the others
            self._not_before[copy.disk_id] = time.monotonic() + _AGAIN_SECONDS
            _log.exception("copy-failed", extra=fields(details))
        else:
            if done:
                self._metrics.actions.labels("copy").inc()
                seconds = done.paused_seconds
                pause = {"paused-ms": round(seconds * 1000)} if seconds is not None else {}
                _log.info("copied", extra=fields(details | pause))
