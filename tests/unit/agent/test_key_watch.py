"""When a key is taken for revoked, and when it is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar, Self

import pytest

from virt_sse.agent.key_watch import KeyWatch, Sample, Verdict, WatchedKey
from virt_sse.backend import Backend
from virt_sse.errors import KeyDeniedError, KeyDisabledError, KeyProviderUnavailableError, UnwrapError
from virt_sse.hookspecs import RegisterKeyProvider, hookimpl
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyProvider, KeyState, ProviderConfig, WrappedDek

NAME = "scripted"


class ScriptedProvider(KeyProvider):
    """Says what a test has written down."""

    name = NAME
    state: ClassVar[KeyState] = KeyState.ENABLED
    refusal: ClassVar[Exception | None] = None
    delay: ClassVar[float] = 0
    unwraps: ClassVar[int] = 0

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        return cls()

    def current_key(self, name: str) -> KeyId:
        return KeyId(NAME, name, "1")

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        return WrappedDek(context.bind(dek), "none", key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        ScriptedProvider.unwraps += 1
        if self.refusal:
            raise self.refusal
        return context.release(wrapped.ciphertext)

    def key_state(self, key: KeyId) -> KeyState:
        time.sleep(self.delay)
        return self.state


@hookimpl
def virt_sse_register_key_providers(register: RegisterKeyProvider) -> None:
    register(NAME, lambda: ScriptedProvider)


class Watched:
    def __init__(self, backend: Backend, probe_seconds: float = 60) -> None:
        plugin = SimpleNamespace(virt_sse_register_key_providers=virt_sse_register_key_providers)
        backend.plugins.register(plugin, NAME)
        made = backend.sets.create("set", provider=NAME, key="key")
        disk = backend.create_disk("disk", 1 << 20, encryption_set="set")
        self.key = WatchedKey(disk.deks[0].wrapped.key, made.id)
        self.samples = {self.key: Sample(disk, disk.deks[0].slot, "domain")}
        self.changes = 0
        self.watch = KeyWatch(
            backend, poll_seconds=0.02, probe_seconds=probe_seconds, changed=self._note_change
        )

    def _note_change(self) -> None:
        self.changes += 1

    def after(self, *, looks: int = 4) -> Verdict | None:
        """What is known some looks later."""
        for _ in range(looks * 2):
            self.watch.watch(self.samples)
            time.sleep(0.02)
        return self.watch.verdict(self.key)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What the provider says from now on."""

    def say(state: KeyState, refusal: Exception | None = None, delay: float = 0) -> None:
        monkeypatch.setattr(ScriptedProvider, "state", state)
        monkeypatch.setattr(ScriptedProvider, "refusal", refusal)
        monkeypatch.setattr(ScriptedProvider, "delay", delay)
        monkeypatch.setattr(ScriptedProvider, "unwraps", 0)

    say(KeyState.ENABLED)
    return say


@pytest.fixture
def watched(backend: Backend, script: Callable[..., None]) -> Iterator[Watched]:
    watched = Watched(backend)
    yield watched
    watched.watch.stop()


def test_a_poll_is_enough_while_the_key_is_enabled(watched: Watched) -> None:
    assert watched.watch.verdict(watched.key) is None
    assert watched.after() == Verdict(KeyState.ENABLED)
    assert ScriptedProvider.unwraps == 0
    assert watched.changes == 1


def test_a_polled_refusal_is_confirmed_by_one_probe(watched: Watched, script: Callable[..., None]) -> None:
    watched.after()
    script(KeyState.DISABLED, KeyDisabledError("vault says no"))
    assert watched.after(looks=8) == Verdict(KeyState.DISABLED, "vault says no")
    assert ScriptedProvider.unwraps == 1
    script(KeyState.ENABLED)
    assert watched.after() == Verdict(KeyState.ENABLED)
    assert ScriptedProvider.unwraps == 1
    assert watched.changes == 3


def test_a_key_that_still_unwraps_is_not_revoked(watched: Watched, script: Callable[..., None]) -> None:
    script(KeyState.DENIED)
    assert watched.after() == Verdict(KeyState.ENABLED)


@pytest.mark.parametrize("error", [KeyProviderUnavailableError("timeout"), UnwrapError("damaged")])
def test_a_probe_without_a_verdict_leaves_the_polled_state(
    watched: Watched, script: Callable[..., None], error: Exception
) -> None:
    script(KeyState.DELETED, error)
    assert watched.after() == Verdict(KeyState.DELETED, f"key {watched.key.key} is deleted")


@pytest.mark.slow
def test_silence_neither_begins_nor_ends_a_revocation(watched: Watched, script: Callable[..., None]) -> None:
    script(KeyState.UNREACHABLE)
    assert watched.after() == Verdict(KeyState.UNREACHABLE)
    script(KeyState.DISABLED, KeyDisabledError("no"))
    watched.after()
    script(KeyState.UNREACHABLE)
    assert watched.after() == Verdict(KeyState.UNREACHABLE, "no")
    script(KeyState.DISABLED, KeyDisabledError("no"))
    assert watched.after() == Verdict(KeyState.DISABLED, "no")
    assert ScriptedProvider.unwraps == 0, "it has been tried"
    script(KeyState.ENABLED, KeyProviderUnavailableError("timeout"))
    assert watched.after() == Verdict(KeyState.UNREACHABLE, "no"), "enabled, but that could not be tried"
    script(KeyState.ENABLED)
    assert watched.after() == Verdict(KeyState.ENABLED)


@pytest.mark.slow
def test_a_periodic_probe_finds_a_refusal_that_polls_do_not(
    backend: Backend, script: Callable[..., None]
) -> None:
    watched = Watched(backend, probe_seconds=0.1)
    try:
        watched.after()
        script(KeyState.ENABLED, KeyDeniedError("no right to unwrap"))
        assert watched.after(looks=10) == Verdict(KeyState.DENIED, "no right to unwrap")
        script(KeyState.ENABLED)
        assert watched.after(looks=10) == Verdict(KeyState.ENABLED)
    finally:
        watched.watch.stop()


def test_a_slow_key_delays_no_other_key(backend: Backend, script: Callable[..., None]) -> None:
    watched = Watched(backend)
    platform = backend.create_disk("other", 1 << 20)
    other = WatchedKey(platform.deks[0].wrapped.key, None)
    samples = {**watched.samples, other: Sample(platform, platform.deks[0].slot, "domain")}
    script(KeyState.DISABLED, KeyDisabledError("no"), delay=0.5)
    watched.watch.watch(samples)
    time.sleep(0.2)
    assert watched.watch.verdict(other) == Verdict(KeyState.ENABLED)
    assert watched.watch.verdict(watched.key) is None
    assert dict(watched.watch.states())[watched.key] is KeyState.UNREACHABLE
    watched.watch.stop()


def test_a_key_no_longer_in_use_is_forgotten(watched: Watched) -> None:
    watched.after()
    watched.watch.watch({})
    assert watched.watch.states() == []
    assert watched.watch.verdict(watched.key) is None
