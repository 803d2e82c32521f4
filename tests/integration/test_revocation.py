"""A key is taken away while guests run on disks under it: what the agent does about that."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from support.agent_site import CustomerSite, key_of
from support.stage_site import StageSite
from support.waiting import wait_until
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.vault_client.permissions import Permission

SOON_SECONDS = 5.0
"""From the administrator's command to the end of the guest, with no grace time."""


@dataclass(frozen=True)
class Case:
    """:ivar refused: what a start says then.
    :ivar give_back: ``None`` where nobody can.
    """

    refused: str
    take: Callable[[CustomerSite, EncryptionSet, Disk], object]
    give_back: Callable[[CustomerSite, EncryptionSet, Disk], object] | None
    seconds: float = SOON_SECONDS


def change_identity(site: CustomerSite, encryption_set: EncryptionSet, *, enabled: bool, age: int) -> None:
    principal = encryption_set.identity
    assert principal
    expires = int(time.time()) - age if age else None
    site.keys.administration.change_principal(principal, enabled=enabled, expires=expires)


def new_identity(site: CustomerSite, encryption_set: EncryptionSet) -> None:
    if site.backend.sets.get(encryption_set.name).identity:
        site.backend.sets.move_to_tenant(encryption_set.name, str(uuid.uuid4()))
    site.grant(site.backend.sets.assign_identity(encryption_set.name))


def purge(site: CustomerSite, encryption_set: EncryptionSet) -> None:
    site.keys.delete(encryption_set.key.name)
    site.keys.purge(encryption_set.key.name)


CASES = {
    "key-disabled": Case("KeyDisabled", lambda s, _, d: s.disable(d), lambda s, _, d: s.enable(d)),
    "key-deleted": Case(
        "KeyNotFound",
        lambda s, e, _: s.keys.delete(e.key.name),
        lambda s, e, _: s.keys.recover(e.key.name),
    ),
    "key-purged": Case("KeyNotFound", lambda s, e, _: purge(s, e), None),
    "access-removed": Case(
        "ForbiddenByPolicy",
        lambda s, e, _: s.keys.administration.revoke(e.identity or ""),
        lambda s, e, _: s.grant(e),
    ),
    "unwrapping-removed": Case(
        "ForbiddenByPolicy",
        lambda s, e, _: s.keys.administration.revoke(e.identity or "", [Permission.UNWRAP_KEY]),
        lambda s, e, _: s.grant(e),
        seconds=SOON_SECONDS + 3,  # it takes a probe
    ),
    "identity-deleted": Case(
        "no token for principal",
        lambda s, e, _: s.keys.administration.delete_principal(e.identity or ""),
        lambda s, e, _: new_identity(s, e),
    ),
    "identity-disabled": Case(
        "no token for principal",
        lambda s, e, _: change_identity(s, e, enabled=False, age=0),
        lambda s, e, _: change_identity(s, e, enabled=True, age=0),
    ),
    "identity-expired": Case(
        "no token for principal",
        lambda s, e, _: change_identity(s, e, enabled=True, age=1),
        lambda s, e, _: change_identity(s, e, enabled=True, age=0),
    ),
    "set-moved-to-another-tenant": Case(
        "has no identity",
        lambda s, e, _: s.backend.sets.move_to_tenant(e.name, str(uuid.uuid4())),
        lambda s, e, _: new_identity(s, e),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_guest_ends_soon_after_its_key_and_starts_again_with_it(site: CustomerSite, case: Case) -> None:
    encryption_set = site.new_set()
    guest, disk = site.guest(encryption_set.name)
    guest.start()
    site.wait_until_watched(guest)

    case.take(site, encryption_set, disk)
    took = wait_until(lambda: not guest.is_active(), "the guest has ended")
    sys.stdout.write(f"shut off after {took:.2f} s\n")
    assert took < case.seconds
    site.wait_for_event("domain-ended", domain=guest.name)
    assert site.secrets() == []

    said = site.refusal(guest)
    assert "virt-sse: error: " in said
    assert case.refused in said
    assert site.secrets() == []
    if case.give_back:
        case.give_back(site, encryption_set, disk)
        guest.start()
        site.wait_until_watched(guest)
        assert guest.is_active()


def test_a_revocation_takes_five_seconds_at_most_by_default(site: CustomerSite) -> None:
    config = site.host.root / "etc/virt-sse/config.toml"
    chosen = config.read_text()
    config.write_text("")
    site.agent.stop()
    site.agent.start()
    try:
        guest, disk = site.guest(site.new_set().name)
        guest.start()
        site.wait_until_watched(guest)
        time.sleep(0.1)
        site.disable(disk)
        took = wait_until(lambda: not guest.is_active(), "the guest has ended")
        sys.stdout.write(f"shut off after {took:.2f} s\n")
        assert took < SOON_SECONDS
    finally:
        config.write_text(chosen)
        site.agent.stop()
        site.agent.start()


def test_only_guests_of_the_disabled_key_end(site: CustomerSite) -> None:
    (taken, disk), (other, _), (platform, _) = (
        site.guest(name) for name in (site.new_set().name, site.new_set().name, None)
    )
    for guest in (taken, other, platform):
        guest.start()
    for guest in (taken, other, platform):
        site.wait_until_watched(guest)
    site.disable(disk)
    wait_until(lambda: not taken.is_active(), "the guest of the disabled key has ended")
    time.sleep(1)
    assert other.is_active()
    assert platform.is_active()
    assert len(site.secrets()) == 2


def test_a_platform_key_is_watched_and_a_lost_keyring_is_no_revocation(site: CustomerSite) -> None:
    guest, disk = site.guest()
    guest.start()
    site.wait_until_watched(guest)
    keyring = site.backend.host.config.state_directory / "platform-managed"
    keyring.rename(keyring.with_name("elsewhere"))
    try:
        site.wait_for_event("key-state", state="unreachable", key=str(key_of(disk)))
    finally:
        keyring.with_name("elsewhere").rename(keyring)
    provider = site.backend.host.plugins.key_provider("platform-managed")
    site.wait_until_watched(guest)
    assert not site.events("domain-revoked", domain=guest.name)
    provider.disable(key_of(disk))  # type: ignore[attr-defined]
    try:
        site.wait_for_event("domain-action", domain=guest.name, action="shutdown")
        guest.destroy()
        assert "is disabled" in site.refusal(guest)
    finally:
        provider.enable(key_of(disk))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_key_disabled_during_a_reencryption_ends_the_guest_and_the_disk_is_as_before(
    site: CustomerSite,
) -> None:
    stages = StageSite(site.host, site.backend, site._acceleration)
    disk = stages.disk("raw", size=8 << 20, encryption_set=site.new_set().name)
    guest = stages.guest(disk)
    guest.start()
    stages.qemu_io(guest, "write -P 0x5a 0 1M")
    stages.qemu_io(guest, "flush")
    site.wait_until_watched(guest)
    job = stages.popen("virt-sse", "disk", "reencrypt", disk.name, "--max-rate", "128K")
    wait_until(lambda: "<mirror" in stages.virsh("dumpxml", guest.name), "QEMU copies the disk")
    site.disable(disk)
    wait_until(lambda: not guest.is_active(), "the guest has ended", seconds=SOON_SECONDS)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1, said
    assert "Traceback" not in said
    assert site.backend.disks.get(disk.name) == disk
    assert "KeyDisabled" in site.refusal(guest)
    assert stages.left() == {}
    assert not list(disk.path.parent.glob(f"{disk.name}-*"))
    site.enable(disk)
    guest.start()
    assert "failed" not in stages.qemu_io(guest, "read -P 0x5a 0 1M")
    guest.destroy()
