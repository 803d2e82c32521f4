"""The agent's list of running domains, with parts that cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast
from unittest.mock import Mock
from uuid import UUID, uuid4

import libvirt
import pytest

from virt_sse.agent.inventory import Inventory
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.store.image_paths import ImagePaths

DISK = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")
OURS = SecretName(DISK, "service").usage


class NoBackupError(libvirt.libvirtError):
    def __init__(self) -> None:
        super().__init__("no backup")

    def get_error_code(self) -> int:
        return libvirt.VIR_ERR_NO_DOMAIN_BACKUP


def disk(usage: str, target: str = "vda") -> str:
    return (
        f"<disk type='file'><source file='/{target}'><encryption format='luks'>"
        f"<secret type='passphrase' usage='{usage}'/></encryption></source><target dev='{target}'/></disk>"
    )


class Domain:
    """A running domain as libvirt shows it."""

    def __init__(self, name: str, *disks: str, backup: str | None = None) -> None:
        self.id = uuid4()
        self.xml = (
            f"<domain><name>{name}</name><uuid>{self.id}</uuid><devices>{''.join(disks)}</devices></domain>"
        )
        self._name, self._backup = name, backup
        self.is_connected = True

    def UUID(self) -> bytes:
        return self.id.bytes

    def ID(self) -> int:
        return 7

    def name(self) -> str:
        return self._name

    def XMLDesc(self) -> str:
        return self.xml

    def connect(self) -> Mock:
        return Mock(isAlive=Mock(return_value=self.is_connected))

    def state(self) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 0

    def backupGetXMLDesc(self) -> str:
        if self._backup is None:
            raise NoBackupError
        return self._backup


class Host:
    """A libvirt with domains and secrets."""

    def __init__(self, *domains: Domain, secrets: tuple[str, ...] = ()) -> None:
        self.domains, self._secrets = domains, secrets

    def listAllDomains(self, _flags: int) -> tuple[Domain, ...]:
        return self.domains

    def listAllSecrets(self) -> list[Mock]:
        return [Mock(usageID=Mock(return_value=usage)) for usage in self._secrets]


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory("test:///", 1, lambda: None, ImagePaths(tmp_path / "image-paths"))


def take(inventory: Inventory, host: Host) -> None:
    inventory._take(cast(libvirt.virConnect, host))


def test_an_odd_secret_does_not_take_its_domain_out_of_the_watch(
    inventory: Inventory, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(Domain("web", disk(OURS), disk("virt-sse:zzz", "vdb")), Domain("db", disk(OURS)))
    take(inventory, host)
    take(inventory, host)
    found = {each.name: [use.disk_id for use in each.uses] for each in inventory.snapshot.domains}
    assert found == {"web": [DISK], "db": [DISK]}
    assert [each.usages for each in inventory.snapshot.domains] == [{OURS}, {OURS}]
    assert inventory.snapshot.unreadable == 1
    assert caplog.messages == ["domain-unclear"], "each part is logged once"
    host.domains = host.domains[1:]
    take(inventory, host)
    assert inventory.snapshot.unreadable == 0


def test_a_definition_beyond_the_limits_is_watched_by_its_secrets(inventory: Inventory) -> None:
    domain = Domain("web", disk(OURS), "<x>" * 1000)
    take(inventory, Host(domain))
    (found,) = inventory.snapshot.domains
    assert (found.uuid, [use.disk_id for use in found.uses]) == (domain.id, [DISK])
    assert inventory.snapshot.unreadable == 1


@pytest.mark.parametrize("backup", ["nonsense", f"<b><disks>{disk('virt-sse:zzz')}</disks></b>"])
def test_an_odd_backup_does_not_hide_its_domain(inventory: Inventory, backup: str) -> None:
    take(inventory, Host(Domain("web", disk(OURS), backup=backup)))
    (found,) = inventory.snapshot.domains
    assert [use.disk_id for use in found.uses] == [DISK]
    assert found.definition.disk_chains(found.backup)
    assert inventory.snapshot.unreadable == 1


def test_odd_secrets_of_libvirt_are_skipped(inventory: Inventory) -> None:
    take(inventory, Host(secrets=("virt-sse:zzz", OURS, "theirs", "", "virt-sse:")))
    assert inventory.snapshot.secrets == {OURS}
    assert inventory.snapshot.unreadable == 2


@pytest.mark.parametrize("failure", [RecursionError, libvirt.libvirtError("internal error")])
def test_after_a_failure_the_domain_stays_as_it_was(
    failure: Exception,
    inventory: Inventory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host(Domain("web", disk(OURS)), Domain("db", disk(OURS)))
    take(inventory, host)
    before = inventory.snapshot.domains
    monkeypatch.setattr(host.domains[0], "state", Mock(side_effect=failure))
    with caplog.at_level(logging.ERROR):
        take(inventory, host)
    assert inventory.snapshot.domains == before
    assert inventory.snapshot.unreadable == 1
    assert "domain-unclear" in caplog.messages


def test_a_lost_connection_ends_the_poll(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(Domain("web", disk(OURS)))
    take(inventory, host)
    before = inventory.snapshot
    host.domains[0].is_connected = False
    monkeypatch.setattr(host.domains[0], "state", Mock(side_effect=libvirt.libvirtError("connection reset")))
    with pytest.raises(libvirt.libvirtError):
        take(inventory, host)
    assert inventory.snapshot is before
