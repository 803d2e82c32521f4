"""Guests on disks under transit keys of a real OpenBao server: rotation, and revocation by the agent."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.agent_site import Site, key_of, prepared
from support.transit_keys import TransitKeys
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.openbao import LabOpenBao
from virt_sse.model.layers import EncryptionType

SOON_SECONDS = 5.0
"""From the administrator's command to the end of the guest, with no grace time."""

CONFIG = """\
[agent]
poll-seconds = 0.4
probe-seconds = 3

[key-providers.vault-transit]
"""


class TransitSite(Site):
    """:ivar keys: the administrator of the host's keys."""

    def __init__(
        self, host: LabHost, backend: Backend, agent: LabAgent, acceleration: Acceleration, keys: TransitKeys
    ) -> None:
        super().__init__(host, backend, agent, acceleration)
        self.keys = keys

    def new_set(self, key: str, encryption_type: EncryptionType = EncryptionType.CUSTOMER_KEY) -> str:
        """A set under that key; its name."""
        name = f"s{uuid.uuid4().hex[:8]}"
        self.virt_sse(
            *("des", "create", name, "--provider", "vault-transit", "--key", key, "--grace", "0"),
            *("--encryption-type", encryption_type.value),
        )
        return name

    def assert_ends(self, guest: Guest, reason: str) -> None:
        took = wait_until(lambda: not guest.is_active(), "the guest has ended")
        sys.stdout.write(f"shut off after {took:.2f} s\n")
        assert took < SOON_SECONDS
        assert reason in self.refusal(guest)
        assert self.secrets() == []


@pytest.fixture(scope="module")
def running_site(
    lab_host: LabHost,
    lab_openbao: LabOpenBao,
    acceleration: Callable[[str], Acceleration],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TransitSite]:
    how = acceleration("boot-sector")
    with TransitKeys(lab_openbao, tmp_path_factory.mktemp("host")) as keys:
        table = "".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.options().items())
        with prepared(lab_host, CONFIG + table) as backend, LabAgent(lab_host) as agent:
            yield TransitSite(lab_host, backend, agent, how, keys)


@pytest.fixture
def site(running_site: TransitSite) -> Iterator[TransitSite]:
    yield running_site
    running_site.forget_domains()


def test_a_guest_lives_through_a_rotation_and_ends_with_its_key(site: TransitSite) -> None:
    key = site.keys.new_key()
    set_name = site.new_set(key)
    guest, disk = site.guest(set_name)
    assert (str(key_of(disk)), disk.deks[0].wrapped.algorithm) == (f"vault-transit:{key}:1", "A256GCMKW")
    guest.start()
    site.wait_until_watched(guest)

    site.keys.rotate(key)
    assert json.loads(site.virt_sse("des", "rotate", set_name, "--output", "json"))["rewrapped"] == 1
    site.keys.configure(key, min_decryption_version=2)  # the old version is not needed any more
    site.wait_until_watched(guest)
    assert key_of(site.backend.disks.get(disk.name)).version == "2"
    assert guest.is_active()

    site.keys.disable_before(key, 3)
    site.assert_ends(guest, "min_decryption_version is 3")
    site.keys.configure(key, min_decryption_version=2)
    guest.start()
    site.wait_until_watched(guest)

    site.keys.delete(key)
    site.assert_ends(guest, "refused the reading of the key (404)")
    log = site.virt_sse("audit", "list", "--output", "json")
    used = [each for each in json.loads(log) if each["key"] == f"vault-transit:{key}"]
    assert {(each["action"], each["result"]) for each in used} >= {
        ("wrap", "allowed"),
        ("unwrap", "allowed"),
        ("unwrap", "refused"),
    }


def test_a_double_disk_needs_both_keys_and_a_sealed_server_ends_nothing(site: TransitSite) -> None:
    double = site.new_set(site.keys.new_key(), EncryptionType.PLATFORM_AND_CUSTOMER_KEYS)
    guest, disk = site.guest(double)
    assert [entry.wrapped.key.provider for entry in disk.deks] == ["vault-transit", "platform-managed"]
    guest.start()
    site.wait_until_watched(guest)

    site.keys.server.seal()
    site.wait_for_event("key-state", state="unreachable", key=str(key_of(disk)))
    assert guest.is_active()
    site.keys.server.unseal()
    site.wait_until_watched(guest)
    assert guest.is_active()

    site.keys.allow("")
    site.assert_ends(guest, "(403 permission denied)")
    site.keys.grant()
    guest.start()
    site.wait_until_watched(guest)
    _no_secret_is_shown(site)


def _no_secret_is_shown(site: TransitSite) -> None:
    """No command line, no environment and no file of the host has the secret_id."""
    secret = site.keys.secret_id.encode()
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                content = (process / name).read_bytes()
            except OSError:
                continue
            assert secret not in content, process
    for path in (site.agent.log_path, *site.host.root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            assert secret not in path.read_bytes(), path
