"""Existing disks get another key: of the platform, of a customer's vault, of a token; also under a guest."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agent_site import CustomerSite
from support.command_line import CommandLine
from support.customer_keys import RIGHTS, CustomerKeys
from support.images import require
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.errors import PolicyError
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disks import NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.vault_client.permissions import Role

M = 1 << 20
CONTENT = bytes(range(256)) * (M // 256)


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path, backend: Backend) -> Iterator[CustomerKeys]:
    require("qemu-img", "qemu-io", "cryptsetup", "qemu-storage-daemon")
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        path = backend.host.config.operator_credential
        path.parent.mkdir(parents=True, exist_ok=True)
        keys.administration.new_credential_file(path, f"host-{uuid.uuid4()}", role=Role.IDENTITY_OPERATOR)
        yield keys


@pytest.mark.slow
@pytest.mark.usefixtures("lab_hsm")
@pytest.mark.parametrize("kind", [EncryptionType.CUSTOMER_KEY, EncryptionType.PLATFORM_AND_CUSTOMER_KEYS])
def test_a_disk_goes_from_key_to_key_and_from_provider_to_provider(
    backend: Backend, keys: CustomerKeys, virt_sse: CommandLine, tmp_path: Path, kind: EncryptionType
) -> None:
    virt_sse("host", "hsm", "init")
    virt_sse("host", "hsm", "create", "web")
    for name, provider, key in (
        ("platform", "platform-managed", "default"),
        ("vault", "customer-managed", keys.new_key()),
        ("other", "customer-managed", keys.new_key(size=3072)),
        ("token", "hsm-simulated", "web"),
    ):
        made = backend.sets.create(name, provider=provider, key=key, encryption_type=kind)
        if made.identity:
            keys.administration.grant(made.identity, RIGHTS)
    plain = tmp_path / "plain"
    plain.write_bytes(CONTENT)
    first = "platform" if kind is EncryptionType.PLATFORM_AND_CUSTOMER_KEYS else None
    before = backend.transfer.import_image(
        NewDisk(name="disk", encryption_set=first), plain, source_format="raw"
    )
    data = before.path.read_bytes()[2 * M :]
    for target in ("vault", "other", "token", "vault"):
        moved = backend.sets.move_disk("disk", target)
        assert moved.key == backend.sets.get(target).key
        assert moved.deks[1:] == before.deks[1:], "the platform's layer keeps its key"
        backend.disks.check("disk")
    assert moved.generation == before.generation + 4
    assert before.path.read_bytes()[2 * M :] == data, "the data was not encrypted again"
    exported = tmp_path / "exported"
    backend.transfer.export("disk", exported, destination_format="raw")
    assert exported.read_bytes() == CONTENT
    with pytest.raises(PolicyError, match="cannot be turned off"):
        backend.sets.move_disk("disk", "platform")
    with pytest.raises(PolicyError, match="cannot be turned off"):
        backend.sets.use_platform_key("disk")


@pytest.mark.slow
def test_a_disk_is_associated_under_a_running_guest_and_leaves_its_old_key(site: CustomerSite) -> None:
    guest, disk = site.guest()
    first, second = site.new_set(), site.new_set()
    guest.start()
    under_first = site.backend.sets.move_disk(disk.name, first.name)
    under_second = site.backend.sets.move_disk(disk.name, second.name)
    assert guest.is_active()
    assert under_second.key == second.key
    site.disable(under_first)
    site.wait_until_watched(guest)
    guest.destroy()
    guest.start()
    site.disable(under_second)
    wait_until(lambda: not guest.is_active(), "the guest has ended")
    assert "KeyDisabled" in site.refusal(guest)
