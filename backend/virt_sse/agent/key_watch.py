"""Keys that are in use: whether they still may be."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from uuid import UUID

from virt_sse.agent.logs import fields
from virt_sse.backend import Backend
from virt_sse.errors import KeyDeniedError, KeyDisabledError, KeyNotFoundError, KeyProviderError, VirtSseError
from virt_sse.model.disks import Disk
from virt_sse.model.events import audit_context
from virt_sse.model.keys import KeyId, KeyState

_log = logging.getLogger(__name__)

_REVOKING = (KeyState.DISABLED, KeyState.DELETED, KeyState.DENIED)
_VERDICTS: tuple[tuple[type[KeyProviderError], KeyState], ...] = (
    (KeyDisabledError, KeyState.DISABLED),
    (KeyNotFoundError, KeyState.DELETED),
    (KeyDeniedError, KeyState.DENIED),
)
_MOST_THREADS = 64
_OVERDUE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class WatchedKey:
    """A version of a key, as the one that asks for it: an encryption set, or the host itself."""

    key: KeyId
    set_id: UUID | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A wrapped DEK with which a key can be tried, and a domain that has it."""

    disk: Disk
    slot: str
    domain: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a key.

    :ivar state: as its provider said last; ``UNREACHABLE`` also when it has not said anything for too long.
    :ivar revoked: why it is taken for revoked; ``None`` when it is not. Silence neither begins nor ends that.
    """

    state: KeyState
    revoked: str | None = None

    @property
    def is_usable(self) -> bool:
        """Whether its provider has said so, and said nothing else since."""
        return self.state is KeyState.ENABLED and self.revoked is None

    def silenced(self) -> Verdict:
        """The same of a key whose provider does not answer any more."""
        return Verdict(KeyState.UNREACHABLE, self.revoked)


@dataclass(slots=True)
class _Entry:
    """:ivar looked: the state that the provider named last, before any trial.
    :ivar settled: the verdict that came of that.
    """

    sample: Sample
    next_look: float
    next_trial: float
    verdict: Verdict | None = None
    looked: KeyState | None = None
    settled: Verdict = Verdict(KeyState.ENABLED)
    asking: Future[None] | None = None
    asked: float = 0.0


class KeyWatch:
    """Asks each key's provider again and again, each in its own time: one dead vault delays no other.

    A look (``key_state``) tells of keys that were disabled, deleted or denied. Before that is believed the
    key is tried, by an unwrap: so a verdict is what a start would meet, it stands in the audit log of both
    sides, and it has a reason. The trial is repeated now and then, and finds the right to unwrap gone where
    the right to look is not.

    :param changed: called, in any thread, when a verdict has changed.
    """

    def __init__(
        self, backend: Backend, *, poll_seconds: float, probe_seconds: float, changed: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._poll_seconds = poll_seconds
        self._probe_seconds = probe_seconds
        self._changed = changed
        self._entries: dict[WatchedKey, _Entry] = {}
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="key")
        self._lock = threading.Lock()

    def watch(self, samples: Mapping[WatchedKey, Sample]) -> float:
        """Watch just these keys from now on, and ask for those that it is time for.

        :return: when to call again, in ``time.monotonic()``.
        """
        now = time.monotonic()
        for gone in self._entries.keys() - samples.keys():
            del self._entries[gone]
        for key, sample in samples.items():
            entry = self._entries.setdefault(key, _Entry(sample, now, now + self._probe_seconds))
            entry.sample = sample
            if entry.asking is not None and not entry.asking.done():
                if now - entry.asked > _OVERDUE_SECONDS:
                    self._note(key, entry, entry.settled.silenced())
            elif entry.next_look <= now:
                entry.next_look, entry.asked = now + self._poll_seconds, now
                entry.asking = self._pool.submit(self._ask, key, entry)
        return min((entry.next_look for entry in self._entries.values()), default=now + self._poll_seconds)

    def verdict(self, key: WatchedKey) -> Verdict | None:
        """What is known of it; ``None`` when nothing is yet."""
        entry = self._entries.get(key)
        return entry.verdict if entry else None

    def states(self) -> list[tuple[WatchedKey, KeyState]]:
        """All that are watched, and their states; before the first answer ``UNREACHABLE``."""
        return [
            (key, entry.verdict.state if entry.verdict else KeyState.UNREACHABLE)
            for key, entry in list(self._entries.items())
        ]

    def stop(self) -> None:
        """Ask no more. Answers under way are waited for; providers bound how long they take."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, key: WatchedKey, entry: _Entry) -> None:
        try:
            verdict = self._judge(key, entry)
        except Exception:  # noqa: BLE001 -- a provider that breaks its contract has said nothing about its key
            _log.exception("key-watch-failed", extra=fields({"key": str(key.key)}))
            verdict = entry.settled.silenced()
        self._note(key, entry, verdict)

    def _judge(self, key: WatchedKey, entry: _Entry) -> Verdict:
        try:
            provider = self._backend.host.plugins.key_provider(key.key.provider, key.set_id)
        except VirtSseError as exc:
            _log.warning("key-provider-broken", extra=fields({"key": str(key.key), "reason": str(exc)}))
            return entry.settled.silenced()
        state = provider.key_state(key.key)
        if state is KeyState.UNREACHABLE:
            return entry.settled.silenced()
        before, entry.looked = entry.looked, state
        now = time.monotonic()
        if state is (before or KeyState.ENABLED) and now < entry.next_trial:
            return entry.settled
        entry.next_trial = now + self._probe_seconds
        verdict = self._try(key, entry.sample, state)
        if verdict is None:
            entry.looked = before  # so that it is tried again at the next look
            return entry.settled.silenced()
        entry.settled = verdict
        return verdict

    def _try(self, key: WatchedKey, sample: Sample, state: KeyState) -> Verdict | None:
        """What an unwrap shows of a key of which a look has shown *state*; ``None`` when that is nothing."""
        looked = Verdict(state, f"key {key.key} is {state.value}") if state in _REVOKING else None
        try:
            with audit_context(domain=sample.domain):
                self._backend.host.keys.unwrap_slot(sample.disk, sample.slot)
        except KeyProviderError as exc:
            for kind, shown in _VERDICTS:
                if isinstance(exc, kind):
                    return Verdict(shown, str(exc))
            return looked
        except VirtSseError as exc:
            _log.warning("key-not-tried", extra=fields({"key": str(key.key), "reason": str(exc)}))
            return looked
        return Verdict(KeyState.ENABLED)

    def _note(self, key: WatchedKey, entry: _Entry, verdict: Verdict) -> None:
        with self._lock:
            before, entry.verdict = entry.verdict, verdict
        if verdict != before:
            level = logging.INFO if verdict.is_usable else logging.WARNING
            told = {"key": str(key.key), "encryption-set": key.set_id, "state": verdict.state.value}
            _log.log(level, "key-state", extra=fields(told | {"revoked": verdict.revoked}))
            self._changed()
