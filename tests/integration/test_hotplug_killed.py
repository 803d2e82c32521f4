"""What killed ``disk attach`` and ``disk detach`` leave of a disk in a running domain."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import set_secrets

TARGETS = {"live": "vdc", "persistent": "vdd"}
"""Target of the disk by the definition that has the disk; the guest never releases a target."""


@pytest.fixture(scope="module")
def domain(prepared_host: Operator, acceleration: Callable[[str], Acceleration]) -> Iterator[str]:
    """Name of a running domain."""
    element = prepared_host.import_boot_sector("boot", stays=True)
    guest = Guest(prepared_host.host, "killed", acceleration=acceleration("boot-sector"), disks=[element])
    guest.define()
    guest.start()
    yield guest.name
    guest.destroy()
    assert prepared_host.secrets() == []


@pytest.fixture
def disk(prepared_host: Operator) -> str:
    """Name of a disk that no domain has."""
    name = f"t{uuid.uuid4().hex[:8]}"
    prepared_host.create(name, "-s", "1M")
    return name


def definitions(operator: Operator, domain: str, disk: str) -> dict[str, bool]:
    """Whether the live and the persistent definition have the disk."""
    options = {"live": (), "persistent": ("--inactive",)}
    return {name: disk in operator.virsh("domblklist", domain, *option) for name, option in options.items()}


def leave(operator: Operator, domain: str, disk: str, definition: str, folder: Path) -> None:
    """Leave the disk in one definition only."""
    target = TARGETS[definition]
    if definition == "live":
        operator.virt_sse("disk", "attach", disk, domain, "--target", target)
        operator.virsh("detach-disk", domain, target, "--config")
    else:
        element = folder / "disk.xml"
        element.write_text(operator.virt_sse("disk", "xml", disk, "--target", target))
        operator.virsh("attach-device", domain, element, "--config")
    assert definitions(operator, domain, disk) == {"live": False, "persistent": False} | {definition: True}


@pytest.mark.parametrize("definition", ["persistent", "live"])
def test_attach_adds_the_disk_to_the_other_definition(
    prepared_host: Operator, domain: str, disk: str, tmp_path: Path, definition: str
) -> None:
    leave(prepared_host, domain, disk, definition, tmp_path)
    before = len(prepared_host.secrets())
    for options in (["--target", "vdb"], ["--read-only"]):
        refused = prepared_host.virt_sse("disk", "attach", disk, domain, *options, status=1)
        assert f"has disk '{disk}' as {TARGETS[definition]} with other options" in refused
    assert f"as {TARGETS[definition]}" in prepared_host.virt_sse("disk", "attach", disk, domain)
    assert definitions(prepared_host, domain, disk) == {"live": True, "persistent": True}
    assert len(prepared_host.secrets()) == before + (definition == "persistent")
    again = prepared_host.virt_sse("disk", "attach", disk, domain, status=1)
    assert f"is attached to domain '{domain}'" in again


def test_detach_removes_the_secrets_of_a_disk_that_no_domain_has(
    prepared_host: Operator, domain: str, disk: str
) -> None:
    """Left by a kill between the removal from the domain and the removal of the secrets."""
    before = prepared_host.secrets()
    with Backend.open(prepared_host.host.root) as backend, connected(prepared_host.host.uri) as connection:
        found = backend.disks.get(disk)
        (entry,) = found.deks
        dek = backend.host.keys.unwrap_slot(found, entry.slot)
        set_secrets(connection, {SecretName(found.id, entry.slot): dek})
    assert prepared_host.secrets() != before
    answer = prepared_host.virt_sse("disk", "detach", disk, domain, status=1)
    assert "does not have disk" in answer
    assert prepared_host.secrets() == before
