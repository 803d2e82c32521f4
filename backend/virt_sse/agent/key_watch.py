"""Watches the keys in use: polls and probes whether each key is still usable."""

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
from virt_sse.errors import KeyProviderError, VirtSseError
from virt_sse.keys.freshness import with_images_envelope
from virt_sse.model.disks import Disk
from virt_sse.model.events import audit_context
from virt_sse.model.keys import KeyId, KeyRef, KeyState

_log = logging.getLogger(__name__)

_REVOKING = (KeyState.DISABLED, KeyState.DELETED, KeyState.DENIED)
_MOST_THREADS = 64
_OVERDUE_SECONDS = 10.0
_ENVELOPE_SECONDS = 3.0
"""Time to read the images of the disks under a revoked key version."""


@dataclass(frozen=True, slots=True)
class WatchedKey:
    """A key version, and the identity for its use.

    :ivar set_id: the encryption set whose identity is used; ``None``: the host's own access.
    """

    key: KeyId
    set_id: UUID | None


@dataclass(frozen=True, slots=True)
class ProbeDek:
    """A wrapped DEK to probe a key with, and the name of a domain with this DEK."""

    disk: Disk
    slot: str
    domain: str


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """The status of a key.

    :ivar state: the state last reported by the key's provider; ``UNREACHABLE`` also if the answer is overdue.
    :ivar revoked: why the key counts as revoked; ``None`` if not revoked. An unreachable provider neither
        begins nor ends a revocation.
    """

    state: KeyState
    revoked: str | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the provider's last report was that the key is enabled."""
        return self.state is KeyState.ENABLED and self.revoked is None

    def unreachable(self) -> KeyStatus:
        """This status, once the provider no longer answers."""
        return KeyStatus(KeyState.UNREACHABLE, self.revoked)


@dataclass(slots=True)
class _WatchEntry:
    """A watched key.

    :ivar polled: the state from the last poll, before any probe.
    :ivar confirmed: the resulting status, after a probe if necessary.
    :ivar request: the last poll, under way or done.
    :ivar requested: start of the last poll, of ``time.monotonic()``.
    """

    probe_dek: ProbeDek
    next_poll: float
    next_probe: float
    status: KeyStatus | None = None
    polled: KeyState | None = None
    confirmed: KeyStatus = KeyStatus(KeyState.ENABLED)
    request: Future[None] | None = None
    requested: float = 0.0


class KeyWatch:
    """Polls each key's provider in a separate thread, so that a dead vault delays no other vault's keys.

    A poll (``key_state``) reports disabled, deleted or denied keys. A change is confirmed by a probe, an
    unwrap: the status then matches the outcome of a domain's start, is recorded in the audit logs of host and
    vault, and has a reason. Probes are also repeated periodically, to detect a missing right to unwrap when
    the right to read the key remains.

    :param changed: called, in any thread, after a change of a status.
    """

    def __init__(
        self, backend: Backend, *, poll_seconds: float, probe_seconds: float, changed: Callable[[], None]
    ) -> None:
        self._backend = backend
        self._poll_seconds = poll_seconds
        self._probe_seconds = probe_seconds
        self._changed = changed
        self._entries: dict[WatchedKey, _WatchEntry] = {}
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="key")
        self._lock = threading.Lock()

    def watch(self, probe_deks: Mapping[WatchedKey, ProbeDek]) -> float:
        """Watch exactly these keys from now on, and start due polls.

        :return: when to call again, in ``time.monotonic()``.
        """
        now = time.monotonic()
        for gone in self._entries.keys() - probe_deks.keys():
            del self._entries[gone]
        for key, probe_dek in probe_deks.items():
            entry = self._entries.setdefault(key, _WatchEntry(probe_dek, now, now + self._probe_seconds))
            entry.probe_dek = probe_dek
            if entry.request is not None and not entry.request.done():
                if now - entry.requested > _OVERDUE_SECONDS:
                    self._record(key, entry, entry.confirmed.unreachable())
            elif entry.next_poll <= now:
                entry.next_poll, entry.requested = now + self._poll_seconds, now
                entry.request = self._pool.submit(self._poll, key, entry)
        return min((entry.next_poll for entry in self._entries.values()), default=now + self._poll_seconds)

    def status(self, key: WatchedKey) -> KeyStatus | None:
        """The status of the key; ``None`` before the first result."""
        entry = self._entries.get(key)
        return entry.status if entry else None

    def states(self) -> list[tuple[WatchedKey, KeyState]]:
        """All watched keys and their states; ``UNREACHABLE`` before the first result."""
        return [
            (key, entry.status.state if entry.status else KeyState.UNREACHABLE)
            for key, entry in list(self._entries.items())
        ]

    def stop(self) -> None:
        """Start no more polls, and wait for polls under way; providers limit the duration."""
        self._pool.shutdown(cancel_futures=True)

    def _poll(self, key: WatchedKey, entry: _WatchEntry) -> None:
        try:
            status = self._current_status(key, entry)
        except Exception:  # noqa: BLE001 -- a provider that breaks its contract reports nothing about the key
            _log.exception("key-watch-failed", extra=fields({"key": str(key.key)}))
            status = entry.confirmed.unreachable()
        self._record(key, entry, status)

    def _current_status(self, key: WatchedKey, entry: _WatchEntry) -> KeyStatus:
        try:
            provider = self._backend.host.plugins.key_provider(key.key.provider, key.set_id)
        except VirtSseError as exc:
            _log.warning("key-provider-broken", extra=fields({"key": str(key.key), "reason": str(exc)}))
            return entry.confirmed.unreachable()
        state = provider.key_state(key.key)
        if state is KeyState.UNREACHABLE:
            return entry.confirmed.unreachable()
        before, entry.polled = entry.polled, state
        now = time.monotonic()
        if state is (before or KeyState.ENABLED) and now < entry.next_probe:
            return entry.confirmed
        entry.next_probe = now + self._probe_seconds
        status = self._probe(key, entry.probe_dek, state)
        if status and status.revoked:
            self._take_newer_envelopes(key)
        if status is None:
            entry.polled = before  # probe again at the next poll
            return entry.confirmed.unreachable()
        entry.confirmed = status
        return status

    def _probe(self, key: WatchedKey, probe_dek: ProbeDek, state: KeyState) -> KeyStatus | None:
        """Status after an unwrap and a poll with the result *state*; ``None`` if neither is conclusive."""
        polled = KeyStatus(state, f"key {key.key} is {state.value}") if state in _REVOKING else None
        try:
            with audit_context(domain=probe_dek.domain):
                self._backend.host.keys.unwrap_slot(probe_dek.disk, probe_dek.slot)
        except KeyProviderError as exc:
            shown = KeyState.of_error(exc)
            return KeyStatus(shown, str(exc)) if shown in _REVOKING else polled
        except VirtSseError as exc:
            _log.warning("key-not-tried", extra=fields({"key": str(key.key), "reason": str(exc)}))
            return polled
        return KeyStatus(KeyState.ENABLED)

    def _take_newer_envelopes(self, key: WatchedKey) -> None:
        """Look for envelopes newer than the store's in the images of all disks under a revoked key version.

        Another host may have moved the disks to a later version, and only then disabled this one. Storage
        that hangs delays the verdict, but does not prevent it.
        """
        worker = threading.Thread(target=self._read_envelopes, args=[key], name="envelopes", daemon=True)
        worker.start()
        worker.join(_ENVELOPE_SECONDS)

    def _read_envelopes(self, key: WatchedKey) -> None:
        host = self._backend.host
        try:
            disks = host.store.under_key(KeyRef(key.key.provider, key.key.name))
        except VirtSseError as exc:
            _log.warning("newer-envelope-failed", extra=fields({"key": str(key.key), "reason": str(exc)}))
            return
        for disk in disks:
            details = {"disk": disk.name, "key": str(key.key)}
            try:
                if all(entry.wrapped.key != key.key for entry in disk.deks):
                    continue
                newer = with_images_envelope(host.freshness, host.opened_store, disk)
                if newer != disk:
                    _log.info("newer-envelope", extra=fields(details | {"generation": newer.generation}))
            except Exception as exc:  # noqa: BLE001 -- one image must not hide the others
                _log.warning("newer-envelope-failed", extra=fields(details | {"reason": str(exc)}))

    def _record(self, key: WatchedKey, entry: _WatchEntry, status: KeyStatus) -> None:
        with self._lock:
            before, entry.status = entry.status, status
        if status != before:
            level = logging.INFO if status.is_usable else logging.WARNING
            details = {"key": str(key.key), "encryption-set": key.set_id, "state": status.state.value}
            _log.log(level, "key-state", extra=fields(details | {"revoked": status.revoked}))
            self._changed()
