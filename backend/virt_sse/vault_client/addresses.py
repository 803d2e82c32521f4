"""Several addresses of one vault: tried in order, each for a part of the time, unreachable ones put last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from virt_sse.errors import KeyProviderUnavailableError
from virt_sse.vault_client.deadlines import remaining, within

T = TypeVar("T")

_PAUSE_SECONDS = 15.0


class VaultAddresses:
    """The URLs of one vault, in order of preference. Thread-safe.

    :param urls: at least one.
    :param pause: seconds for which an address counts as unreachable after a failure.
    """

    def __init__(self, urls: Sequence[str], *, pause: float = _PAUSE_SECONDS) -> None:
        self.urls = tuple(urls)
        self._pause = pause
        self._avoided: dict[str, float] = {}
        self._lock = threading.Lock()

    def first_answer(self, ask: Callable[[str], T], *, timeout: float, repeatable: bool = True) -> T:
        """The answer of the first address that answers.

        A refusal is an answer: an instance that refuses is never overruled by another instance.

        :param ask: sends the request to a URL; raises :exc:`KeyProviderUnavailableError` only for no answer.
        :param timeout: in seconds, for all addresses together. Each address has an equal share of the time
            left.
        :param repeatable: whether the request is idempotent; otherwise only one address is tried.
        :raise KeyProviderUnavailableError: When no address answers.
        """
        failures: list[KeyProviderUnavailableError] = []
        with within(timeout):
            urls = self._in_order()[: None if repeatable else 1]
            for number, url in enumerate(urls):
                try:
                    with within((remaining() or 0.0) / (len(urls) - number)):
                        answer = ask(url)
                except KeyProviderUnavailableError as exc:
                    self._avoid(url)
                    failures.append(exc)
                except BaseException:
                    self._prefer(url)
                    raise
                else:
                    self._prefer(url)
                    return answer
        if len(failures) == 1:
            raise failures[0]
        reasons = "; ".join(map(str, failures))
        raise KeyProviderUnavailableError(f"no address of the key vault answers: {reasons}") from failures[-1]

    def _in_order(self) -> list[str]:
        """The addresses without a recent failure, then the others.

        If a failure is no longer recent, one thread tries its address first; the other threads keep to the
        other addresses until the address has answered.
        """
        with self._lock:
            now = time.monotonic()
            first = [url for url in self.urls if self._avoided.get(url, 0.0) <= now]
            last = [url for url in self.urls if url not in first]
            for url in first:
                if url in self._avoided:
                    self._avoided[url] = now + self._pause
            return first + last

    def _avoid(self, url: str) -> None:
        with self._lock:
            self._avoided[url] = time.monotonic() + self._pause

    def _prefer(self, url: str) -> None:
        with self._lock:
            self._avoided.pop(url, None)
