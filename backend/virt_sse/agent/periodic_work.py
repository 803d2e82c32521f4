"""Base class of agent parts that work periodically, whether libvirt answers or not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from virt_sse.agent.logs import fields
from virt_sse.errors import VirtSseError

_log = logging.getLogger(__name__)


class PeriodicWork:
    """Works in a thread of its own, again and again: the storage of a disk, or a vault, may hang.

    :param name: the thread's name.
    :param seconds: pause between two rounds.
    :param failure: the log event of a failed round; *details* are its fields beside the reason.
    """

    def __init__(
        self, name: str, seconds: float, failure: str, details: Mapping[str, object] | None = None
    ) -> None:
        self._seconds = seconds
        self._failure = failure
        self._details = details or {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin the first round."""
        self._thread.start()

    def stop(self) -> None:
        """Stop. A round under way may be interrupted: the next round or command continues its work."""
        self._stop.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._work()
            except VirtSseError as exc:
                _log.warning(self._failure, extra=fields({**self._details, "reason": str(exc)}))
            except Exception:  # noqa: BLE001 -- the next round tries again
                _log.exception(self._failure)
            self._stop.wait(self._seconds)

    def _work(self) -> None:
        raise NotImplementedError
