"""The customer-managed provider at a real key vault: what becomes of a key, and what comes of that."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.customer_keys import RIGHTS, CustomerKeys
from support.forking import fork
from support.strange_vaults import Listener
from virt_sse.errors import (
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyProviderError,
    KeyProviderUnavailableError,
)
from virt_sse.lab.vaults import LabVault
from virt_sse.model.events import correlated
from virt_sse.model.keys import Dek, DekContext, KeyState
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault_client.permissions import Permission

CONTEXT = DekContext(uuid.uuid4(), "service")


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "identities") as keys:
        yield keys


class Disk:
    """A DEK wrapped with the newest version of a new key, as an identity that may no more than is needed."""

    def __init__(self, keys: CustomerKeys, **options: object) -> None:
        self.identity = keys.new_identity(*RIGHTS)
        self.principal = keys.client_id(self.identity)
        self.provider = keys.open_provider(self.identity, **options)
        self.name = keys.new_key()
        self.key = self.provider.current_key(self.name)
        self.dek = Dek.generate()
        self.wrapped = self.provider.wrap(self.dek, self.key, context=CONTEXT)

    @property
    def state(self) -> KeyState:
        return self.provider.key_state(self.key)

    def opens(self) -> bool:
        return self.provider.unwrap(self.wrapped, context=CONTEXT) == self.dek

    def assert_opens(self, *, times: int) -> None:
        for _ in range(times):
            assert self.opens()

    def assert_refused(self, state: KeyState, error: type[KeyProviderError], message: str) -> None:
        """At once, in every way, and again."""
        began = time.monotonic()
        for _ in range(2):
            assert self.state is state
            for use in (
                lambda: self.opens(),
                lambda: self.provider.wrap(self.dek, self.key, context=CONTEXT),
            ):
                with pytest.raises(error, match=message) as caught:
                    use()
                assert type(caught.value) is error
                assert "eyJ" not in "".join(traceback.format_exception(caught.value))  # as a token begins
        assert time.monotonic() - began < 3

    def assert_usable(self) -> None:
        assert self.state is KeyState.ENABLED
        assert self.opens()


@pytest.fixture
def disk(keys: CustomerKeys) -> Disk:
    return Disk(keys)


# --- What the key's administrator does


@pytest.mark.parametrize("size", [2048, 3072, 4096])
def test_keys_of_every_size_wrap_and_unwrap(keys: CustomerKeys, size: int) -> None:
    provider = keys.open_provider(keys.new_identity(*RIGHTS))
    key = provider.current_key(keys.new_key(size=size))
    dek = Dek.generate()
    wrapped = provider.wrap(dek, key, context=CONTEXT)
    assert len(wrapped.ciphertext) * 8 == size
    assert provider.unwrap(wrapped, context=CONTEXT) == dek


def test_a_disabled_key_is_refused_until_enabled_again(keys: CustomerKeys, disk: Disk) -> None:
    keys.enable(disk.key, enabled=False)
    disk.assert_refused(KeyState.DISABLED, KeyDisabledError, r"vault refused the .*wrap \(403 KeyDisabled\)")
    keys.enable(disk.key, enabled=True)
    disk.assert_usable()


def test_a_deleted_key_is_refused_until_recovered_and_a_purged_key_for_good(
    keys: CustomerKeys, disk: Disk
) -> None:
    missing = r"vault refused the .*wrap \(404 KeyNotFound\)"
    keys.delete(disk.name)
    disk.assert_refused(KeyState.DELETED, KeyNotFoundError, missing)
    with pytest.raises(KeyNotFoundError) as caught:
        disk.provider.current_key(disk.name)
    assert "can be recovered" in str(caught.value.hint)
    keys.recover(disk.name)
    disk.assert_usable()
    keys.delete(disk.name)
    keys.purge(disk.name)
    disk.assert_refused(KeyState.DELETED, KeyNotFoundError, missing)


def test_an_identity_without_access_is_denied_until_granted_again(keys: CustomerKeys, disk: Disk) -> None:
    keys.administration.revoke(disk.principal)
    disk.assert_refused(
        KeyState.DENIED, KeyDeniedError, r"vault refused the .*wrap \(403 ForbiddenByPolicy\)"
    )
    with pytest.raises(KeyDeniedError) as caught:
        disk.opens()
    assert disk.principal in str(caught.value.hint)
    keys.administration.grant(disk.principal, RIGHTS)
    disk.assert_usable()


def test_an_identity_that_may_only_unwrap_cannot_wrap(keys: CustomerKeys, disk: Disk) -> None:
    keys.administration.set_permissions(disk.principal, [Permission.UNWRAP_KEY])
    assert disk.opens()
    with pytest.raises(KeyDeniedError, match="refused the wrap"):
        disk.provider.wrap(disk.dek, disk.key, context=CONTEXT)
    with pytest.raises(KeyDeniedError, match="refused the reading of the key"):
        disk.provider.current_key(disk.name)


def test_a_disabled_identity_is_denied_until_enabled_again(keys: CustomerKeys, disk: Disk) -> None:
    keys.administration.change_principal(disk.principal, enabled=False, expires=None)
    no_token = f"vault refused the .*wrap: no token for principal {disk.principal}"
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, no_token)
    keys.administration.change_principal(disk.principal, enabled=True, expires=None)
    disk.assert_usable()


def test_an_expired_identity_is_denied_until_extended(keys: CustomerKeys, disk: Disk) -> None:
    keys.administration.change_principal(disk.principal, enabled=True, expires=int(time.time()) - 1)
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, "no token for principal")
    keys.administration.change_principal(disk.principal, enabled=True, expires=int(time.time()) + 3600)
    disk.assert_usable()


def test_a_deleted_identity_is_denied_for_good(keys: CustomerKeys, disk: Disk) -> None:
    keys.administration.delete_principal(disk.principal)
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, "no token for principal")
    disk.provider = keys.open_provider(disk.identity)  # nor to one who never had a token
    disk.assert_refused(KeyState.DENIED, KeyDeniedError, "no token for principal")


def test_rotation_is_the_administrators_unless_granted(keys: CustomerKeys, disk: Disk) -> None:
    with pytest.raises(KeyDeniedError, match=r"refused the rotation \(403 ForbiddenByPolicy\)") as caught:
        disk.provider.rotate(disk.name)
    assert "task of the key's administrator" in str(caught.value.hint)
    assert disk.provider.current_key(disk.name) == disk.key
    keys.administration.grant(disk.principal, [Permission.ROTATE])
    rotated = disk.provider.rotate(disk.name)
    assert disk.provider.current_key(disk.name) == rotated != disk.key
    disk.assert_usable()


def test_an_expired_key_still_unwraps(keys: CustomerKeys, disk: Disk) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    name = disk.name.rsplit("/", 1)[1]
    keys.client.update_key_properties(name, disk.key.version, expires_on=past)
    disk.assert_usable()
    with pytest.raises(KeyDeniedError, match=r"refused the wrap \(403 KeyExpired\)"):
        disk.provider.wrap(disk.dek, disk.key, context=CONTEXT)


def test_the_vault_records_who_used_which_key_for_which_disk(
    keys: CustomerKeys, disk: Disk, lab_vault: LabVault
) -> None:
    with correlated() as allowed:
        assert disk.opens()
    keys.enable(disk.key, enabled=False)
    with correlated() as refused, pytest.raises(KeyDisabledError):
        disk.opens()
    lines = VaultDirectory(lab_vault.directory).audit_path.read_text("utf-8").splitlines()
    records = [record for line in lines if (record := json.loads(line))["key"] == disk.name]
    for correlation, outcome, reason in ((allowed, "allowed", None), (refused, "refused", "KeyDisabled")):
        (record,) = [each for each in records if each["correlation"] == str(correlation)]
        assert (record["action"], record["result"], record["reason"]) == ("unwrap", outcome, reason)
        assert (record["disk"], record["key-version"]) == (str(CONTEXT.disk_id), disk.key.version)
        assert disk.principal in record["actor"]


# --- Many at once


@pytest.mark.slow
def test_threads_see_only_verdicts_while_the_identity_is_disabled_and_enabled(
    keys: CustomerKeys, disk: Disk
) -> None:
    outcomes: set[str] = set()
    states: set[KeyState] = set()
    end = time.monotonic() + 2

    def work(_: int) -> None:
        while time.monotonic() < end:
            try:
                outcomes.add(f"opened: {disk.opens()}")
            except KeyProviderError as exc:
                outcomes.add(type(exc).__name__)
            states.add(disk.state)

    with ThreadPoolExecutor(10) as pool:
        working = [pool.submit(work, number) for number in range(10)]
        while time.monotonic() < end - 0.3:
            for enabled in (False, True):
                keys.administration.change_principal(disk.principal, enabled=enabled, expires=None)
                time.sleep(0.1)
        for each in working:
            each.result()
    assert outcomes == {"opened: True", "KeyDeniedError"}
    assert states == {KeyState.ENABLED, KeyState.DENIED}
    disk.assert_usable()


def test_a_fork_uses_connections_of_its_own(disk: Disk) -> None:
    children = []
    for _ in range(3):
        assert disk.opens()
        children.append(fork(lambda _report: disk.assert_opens(times=10)))
    assert all(disk.opens() for _ in range(20))
    assert [child.wait() for child in children] == [0, 0, 0]
    disk.assert_usable()


# --- The vault goes away


@pytest.mark.slow
def test_a_stopped_killed_or_frozen_vault_is_unreachable_and_no_verdict(tmp_path: Path) -> None:
    with LabVault() as vault, CustomerKeys(vault, tmp_path / "identities") as keys:
        disk = Disk(keys)
        for end in (vault.stop, vault.kill):
            end()
            unanswered = f"the key vault {vault.url} does not answer: Connection refused"
            disk.assert_refused(KeyState.UNREACHABLE, KeyProviderUnavailableError, unanswered)
            vault.start()
            disk.assert_usable()
        os.kill(vault.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(KeyProviderUnavailableError, match="does not answer: timed out"):
                disk.opens()
            assert time.monotonic() - began < 6
        finally:
            os.kill(vault.pid, signal.SIGCONT)
        disk.assert_usable()


def test_another_address_answers_for_a_silent_one_and_a_refusal_holds(
    keys: CustomerKeys, lab_vault: LabVault
) -> None:
    short = {"connection-timeout": 2.0, "read-timeout": 2.0}
    with Listener() as silent, Listener() as unasked:
        addresses = {lab_vault.url: [silent.url, lab_vault.url, unasked.url]}
        disk = Disk(keys, addresses=addresses, **short)
        disk.assert_usable()
        assert len(silent.connections) == 1  # later requests avoid the address, also for tokens
        keys.enable(disk.key, enabled=False)
        disk.assert_refused(KeyState.DISABLED, KeyDisabledError, "403 KeyDisabled")
        keys.administration.delete_principal(disk.principal)
        disk.assert_refused(KeyState.DENIED, KeyDeniedError, "no token for principal")
        assert unasked.connections == []


@pytest.mark.slow
def test_a_throttling_vault_is_retried_for_a_short_time(tmp_path: Path) -> None:
    with LabVault(arguments=("--rate", "40")) as vault, CustomerKeys(vault, tmp_path / "identities") as keys:
        disk = Disk(keys)
        outcomes = []
        began = time.monotonic()
        while len(outcomes) < 60:
            outcomes.append(disk.opens())
        assert all(outcomes)
        assert time.monotonic() - began < 10
