"""The key watch: polls, probes, and when a key counts as revoked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar, Self

import pytest

from support.waiting import wait_until
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyStatus, KeyWatch, ProbeDek, WatchedKey
from virt_sse.backend import Backend
from virt_sse.errors import KeyDeniedError, KeyDisabledError, KeyProviderUnavailableError, UnwrapError
from virt_sse.hookspecs import RegisterKeyProvider, hookimpl
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import NewDisk
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyProvider, KeyState, ProviderConfig, WrappedDek

NAME = "scripted"


class ScriptedProvider(KeyProvider):
    """Answers as scripted by the test."""

    name = NAME
    state: ClassVar[KeyState] = KeyState.ENABLED
    refusal: ClassVar[Exception | None] = None
    delay: ClassVar[float] = 0
    unwraps: ClassVar[int] = 0
    polls: ClassVar[int] = 0

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
        ScriptedProvider.polls += 1
        time.sleep(self.delay)
        return self.state


@hookimpl
def virt_sse_register_key_providers(register: RegisterKeyProvider) -> None:
    register(NAME, lambda: ScriptedProvider)


class Watched:
    def __init__(self, backend: Backend, probe_seconds: float = 60) -> None:
        plugin = SimpleNamespace(virt_sse_register_key_providers=virt_sse_register_key_providers)
        backend.host.plugins.register(plugin, NAME)
        made = backend.sets.create("set", provider=NAME, key="key")
        disk = backend.disks.create(NewDisk(name="disk", size=1 << 20, encryption_set="set"))
        self.key = WatchedKey(disk.deks[0].wrapped.key, made.id)
        self.probe_deks = {self.key: ProbeDek(disk, disk.deks[0].slot, "domain")}
        self.changes = 0
        self.watch = KeyWatch(
            backend, poll_seconds=0.02, probe_seconds=probe_seconds, changed=self._note_change
        )

    def _note_change(self) -> None:
        self.changes += 1

    def after(self, *, polls: int = 4) -> KeyStatus | None:
        """The status some polls later."""
        for _ in range(polls * 2):
            self.watch.watch(self.probe_deks)
            time.sleep(0.02)
        return self.watch.status(self.key)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the provider's answers from now on."""

    def say(state: KeyState, refusal: Exception | None = None, delay: float = 0) -> None:
        monkeypatch.setattr(ScriptedProvider, "state", state)
        monkeypatch.setattr(ScriptedProvider, "refusal", refusal)
        monkeypatch.setattr(ScriptedProvider, "delay", delay)
        monkeypatch.setattr(ScriptedProvider, "unwraps", 0)
        monkeypatch.setattr(ScriptedProvider, "polls", 0)

    say(KeyState.ENABLED)
    return say


@pytest.fixture
def watched(backend: Backend, script: Callable[..., None]) -> Iterator[Watched]:
    watched = Watched(backend)
    yield watched
    watched.watch.stop()


def test_polls_suffice_while_the_key_is_usable(watched: Watched) -> None:
    assert watched.watch.status(watched.key) is None
    assert watched.after() == KeyStatus(KeyState.ENABLED)
    assert ScriptedProvider.unwraps == 0
    assert watched.changes == 1


def test_a_key_is_asked_for_once_for_all_its_disks(watched: Watched, backend: Backend) -> None:
    for number in range(3):
        backend.disks.create(NewDisk(name=f"other-{number}", size=1 << 20, encryption_set="set"))
    domains = tuple(
        RunningDomain(
            uuid=disk.id,
            run=1,
            name=disk.name,
            uses=(DomainDisk(disk.id, disk.deks[0].slot, disk.path, "vda"),),
            runs=True,
            paused_for_key=False,
            usages=frozenset(),
            definition=DomainDefinition.parse("<domain/>"),
        )
        for disk in backend.disks.all()
    )
    report = KeyStatusLookup(backend, watched.watch).of(InventorySnapshot(number=1, domains=domains))
    assert len(report.domains) == 4
    watched.watch.watch(report.probe_deks)
    wait_until(lambda: watched.watch.status(watched.key), "the key's status is known")
    assert ScriptedProvider.polls == 1


def test_a_polled_change_is_probed_once_before_it_counts(
    watched: Watched, script: Callable[..., None]
) -> None:
    watched.after()
    script(KeyState.DISABLED, KeyDisabledError("vault says no"))
    assert watched.after(polls=8) == KeyStatus(KeyState.DISABLED, "vault says no")
    assert ScriptedProvider.unwraps == 1
    script(KeyState.ENABLED)
    assert watched.after() == KeyStatus(KeyState.ENABLED)
    assert ScriptedProvider.unwraps == 1
    assert watched.changes == 3


def test_a_key_that_still_unwraps_is_not_revoked(watched: Watched, script: Callable[..., None]) -> None:
    script(KeyState.DENIED)
    assert watched.after() == KeyStatus(KeyState.ENABLED)


@pytest.mark.parametrize("error", [KeyProviderUnavailableError("timeout"), UnwrapError("damaged")])
def test_an_inconclusive_probe_leaves_the_polled_state(
    watched: Watched, script: Callable[..., None], error: Exception
) -> None:
    script(KeyState.DELETED, error)
    assert watched.after() == KeyStatus(KeyState.DELETED, f"key {watched.key.key} is deleted")


@pytest.mark.slow
def test_silence_neither_begins_nor_ends_a_revocation(watched: Watched, script: Callable[..., None]) -> None:
    script(KeyState.UNREACHABLE)
    assert watched.after() == KeyStatus(KeyState.UNREACHABLE)
    script(KeyState.DISABLED, KeyDisabledError("no"))
    watched.after()
    script(KeyState.UNREACHABLE)
    assert watched.after() == KeyStatus(KeyState.UNREACHABLE, "no")
    script(KeyState.DISABLED, KeyDisabledError("no"))
    assert watched.after() == KeyStatus(KeyState.DISABLED, "no")
    assert ScriptedProvider.unwraps == 0, "it has been probed"
    script(KeyState.ENABLED, KeyProviderUnavailableError("timeout"))
    assert watched.after() == KeyStatus(KeyState.UNREACHABLE, "no"), "enabled, but the probe was inconclusive"
    script(KeyState.ENABLED)
    assert watched.after() == KeyStatus(KeyState.ENABLED)


@pytest.mark.slow
def test_periodic_probes_detect_what_polls_do_not(backend: Backend, script: Callable[..., None]) -> None:
    watched = Watched(backend, probe_seconds=0.1)
    try:
        watched.after()
        script(KeyState.ENABLED, KeyDeniedError("no right to unwrap"))
        assert watched.after(polls=10) == KeyStatus(KeyState.DENIED, "no right to unwrap")
        script(KeyState.ENABLED)
        assert watched.after(polls=10) == KeyStatus(KeyState.ENABLED)
    finally:
        watched.watch.stop()


def test_a_slow_key_delays_no_other_key(backend: Backend, script: Callable[..., None]) -> None:
    watched = Watched(backend)
    platform = backend.disks.create(NewDisk(name="other", size=1 << 20))
    other = WatchedKey(platform.deks[0].wrapped.key, None)
    probe_deks = {**watched.probe_deks, other: ProbeDek(platform, platform.deks[0].slot, "domain")}
    script(KeyState.DISABLED, KeyDisabledError("no"), delay=0.5)
    watched.watch.watch(probe_deks)
    time.sleep(0.2)
    assert watched.watch.status(other) == KeyStatus(KeyState.ENABLED)
    assert watched.watch.status(watched.key) is None
    assert dict(watched.watch.states())[watched.key] is KeyState.UNREACHABLE
    watched.watch.stop()


def test_an_unused_key_is_forgotten(watched: Watched) -> None:
    watched.after()
    watched.watch.watch({})
    assert watched.watch.states() == []
    assert watched.watch.status(watched.key) is None
