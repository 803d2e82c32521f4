from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Self
from uuid import UUID

import pytest

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result
from virt_sse.config import Config
from virt_sse.errors import AuditError, KeyDeniedError, KeyDisabledError, KeyOperationUnsupportedError
from virt_sse.hookspecs import RegisterKeyProvider, hookimpl
from virt_sse.keys.access import KeyAccess
from virt_sse.model.events import KeyAction, KeyEvent, audit_context, current_correlation
from virt_sse.model.keys import (
    Dek,
    DekContext,
    KeyId,
    KeyProvider,
    KeyRef,
    KeyState,
    ProviderConfig,
    WrappedDek,
)
from virt_sse.plugins import PluginHost

CONTEXT = DekContext(UUID(int=1), "service")
DEFAULT = KeyRef("platform-managed", "default")


class Probe(KeyProvider):
    """Keeps DEKs in memory, notes the correlation ids, and raises what it is told to."""

    name = "probe"

    def __init__(self) -> None:
        self.correlations: list[UUID | None] = []
        self.error: BaseException | None = None
        self._deks: list[Dek] = []

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        return cls()

    def current_key(self, name: str) -> KeyId:
        return KeyId(self.name, name, "1")

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        self._called()
        self._deks.append(dek)
        return WrappedDek(bytes([len(self._deks) - 1]), "none", key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        self._called()
        return self._deks[wrapped.ciphertext[0]]

    def key_state(self, key: KeyId) -> KeyState:
        return KeyState.ENABLED

    def _called(self) -> None:
        self.correlations.append(current_correlation())
        if self.error:
            raise self.error


class Host:
    """Key access with the platform's keys and the probe's, and what observers were told."""

    def __init__(self, root: Path) -> None:
        config = Config.load(root)
        self.folder = config.log_directory
        self.plugins = PluginHost(config)
        self.events: list[KeyEvent] = []

        @hookimpl
        def virt_sse_register_key_providers(register: RegisterKeyProvider) -> None:
            register(Probe.name, lambda: Probe)

        @hookimpl
        def virt_sse_key_event(event: KeyEvent) -> None:
            self.events.append(event)

        observer = SimpleNamespace(
            virt_sse_register_key_providers=virt_sse_register_key_providers,
            virt_sse_key_event=virt_sse_key_event,
        )
        self.plugins.register(observer, "probe")
        self.plugins.key_provider(DEFAULT.provider).provision()
        self.log = AuditLog.of_host(config)
        self.wrapping = KeyAccess(self.plugins, self.log)

    @property
    def probe(self) -> Probe:
        provider = self.plugins.key_provider(Probe.name)
        assert isinstance(provider, Probe)
        return provider

    def records(self) -> list[AuditRecord]:
        assert self.log.verify().broken is None
        return [entry.record for entry in self.log.records()]

    def wrap(self, dek: Dek, key: KeyRef = DEFAULT) -> WrappedDek:
        return self.wrapping.wrap(dek, self.wrapping.current_key(key), context=CONTEXT)

    def break_log(self) -> None:
        self.folder.rename(self.folder.with_name("away"))
        self.folder.touch()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.plugins.close()


def test_every_use_is_recorded_before_observers_hear_of_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/virt-sse"])
    dek = Dek.generate()
    wrapped = host.wrap(dek)
    with audit_context(domain="web"):
        assert host.wrapping.unwrap(wrapped, context=CONTEXT) == dek
    rotated = host.wrapping.rotate(DEFAULT)

    wrap, unwrap, asked, rotate = host.records()
    for record in (wrap, unwrap):
        assert (record.component, record.result, record.reason) == (Component.HOST, Result.ALLOWED, None)
        assert (record.key, record.key_version) == (str(DEFAULT), wrapped.key.version)
        assert (record.disk, record.slot) == (CONTEXT.disk_id, CONTEXT.slot)
        assert "virt-sse[" in record.actor
        assert record.source
    assert (wrap.action, wrap.domain) == ("wrap", None)
    assert (unwrap.action, unwrap.domain) == ("unwrap", "web")
    assert (asked.action, asked.result, asked.key_version) == ("rotate", Result.REQUESTED, None)
    assert (rotate.action, rotate.result, rotate.key_version) == ("rotate", Result.ALLOWED, rotated.version)
    assert (rotate.disk, rotate.slot) == (None, None)
    assert asked.correlation == rotate.correlation

    assert [event.action for event in host.events] == [KeyAction.WRAP, KeyAction.UNWRAP, KeyAction.ROTATE]
    correlations = [event.correlation for event in host.events]
    assert correlations == [wrap.correlation, unwrap.correlation, rotate.correlation]
    assert len(set(correlations)) == 3


def test_the_provider_knows_the_correlation_while_it_is_called(host: Host) -> None:
    key = KeyRef(Probe.name, "default")
    host.wrapping.unwrap(host.wrap(Dek.generate(), key), context=CONTEXT)
    assert host.probe.correlations == [record.correlation for record in host.records()]
    assert current_correlation() is None


def test_a_refusal_is_recorded_with_its_reason(host: Host) -> None:
    wrapped = host.wrap(Dek.generate())
    provider = host.plugins.key_provider(DEFAULT.provider)
    provider.disable(wrapped.key)  # type: ignore[attr-defined] -- of this provider
    with pytest.raises(KeyDisabledError):
        host.wrapping.unwrap(wrapped, context=CONTEXT)
    with pytest.raises(KeyOperationUnsupportedError):
        host.wrapping.rotate(KeyRef(Probe.name, "default"))
    _, unwrap, _, rotate = host.records()
    assert (unwrap.action, unwrap.result) == ("unwrap", Result.REFUSED)
    assert unwrap.reason == f"KeyDisabledError: key {wrapped.key} is disabled"
    assert (rotate.action, rotate.result, rotate.key_version) == ("rotate", Result.REFUSED, None)
    assert rotate.reason is not None
    assert rotate.reason.startswith("KeyOperationUnsupportedError: ")
    assert [bool(event.error) for event in host.events] == [False, True, True]


def test_no_dek_is_handed_out_without_a_record(host: Host) -> None:
    dek = Dek.generate()
    wrapped = host.wrap(dek)
    host.break_log()
    uses: list[Callable[[], object]] = [
        lambda: host.wrap(dek),
        lambda: host.wrapping.unwrap(wrapped, context=CONTEXT),
        lambda: host.wrapping.rotate(DEFAULT),
    ]
    for use in uses:
        with pytest.raises(AuditError, match="cannot write the audit log") as caught:
            use()
        assert "cannot be recorded is refused" in str(caught.value.hint)
    assert host.wrapping.current_key(DEFAULT) == wrapped.key  # it was not even rotated
    assert len(host.events) == 1


def test_a_refusal_stays_one_when_it_cannot_be_recorded(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    wrapped = host.wrap(Dek.generate(), KeyRef(Probe.name, "default"))
    host.break_log()
    host.probe.error = KeyDeniedError("not you")
    with pytest.raises(KeyDeniedError, match="not you"):
        host.wrapping.unwrap(wrapped, context=CONTEXT)
    assert "a refusal to unwrap with key probe:default is not in the audit log" in caplog.text


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_outcome_of_a_use_is_recorded_without_foreign_messages(
    host: Host, kind: type[BaseException]
) -> None:
    key = KeyRef(Probe.name, "default")
    dek = Dek.generate()
    wrapped = host.wrap(dek, key)
    host.probe.error = kind(f"cannot unwrap {dek.passphrase.decode()}")
    with pytest.raises(kind):
        host.wrapping.unwrap(wrapped, context=CONTEXT)
    assert (host.records()[-1].result, host.records()[-1].reason) == (Result.REFUSED, kind.__name__)


def test_no_dek_is_in_the_log(host: Host) -> None:
    deks = [Dek.generate() for _ in range(20)]
    for key in (DEFAULT, KeyRef(Probe.name, "default")):
        for dek in deks:
            host.wrapping.unwrap(host.wrap(dek, key), context=CONTEXT)
            if key.provider == Probe.name:
                host.probe.error = RuntimeError(f"{dek.material!r} {dek.material.hex()} {dek.passphrase!r}")
                with pytest.raises(RuntimeError):
                    host.wrap(dek, key)
                host.probe.error = None
    content = b"".join(path.read_bytes() for path in host.folder.iterdir())
    assert content.count(b"\n") == 101  # with the head's
    for dek in deks:
        shapes = (dek.material, dek.material.hex().encode(), dek.passphrase, repr(dek.material).encode())
        for shape in (*shapes, base64.urlsafe_b64encode(dek.material)):
            assert shape not in content
