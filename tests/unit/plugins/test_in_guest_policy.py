from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from virt_sse.errors import PolicyError
from virt_sse.model.content import Content, EncryptionKind, Finding
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType
from virt_sse.model.operations import AttachDisk, CreateDisk, MoveDisk, Operation, Site, UpdateVm
from virt_sse.model.vms import VmProperties
from virt_sse_plugins.policies import virt_sse_validate

CUSTOMER = KeyRef("customer-managed", "https://vault/keys/web")
OFF, ON = VmProperties(), VmProperties(encryption_at_host=True)

DISK = Disk(
    id=uuid4(),
    name="one",
    path=Path("/images/one.qcow2"),
    format=DiskFormat.QCOW2,
    size=1 << 30,
    state=DiskState.READY,
    encryption_type=EncryptionType.PLATFORM_KEY,
    created=datetime.now(UTC),
    generation=1,
    deks=(),
)
CUSTOMERS = dataclasses.replace(DISK, encryption_type=EncryptionType.CUSTOMER_KEY)
SET = EncryptionSet(
    id=uuid4(),
    name="web",
    key=CUSTOMER,
    key_version=None,
    encryption_type=EncryptionType.CUSTOMER_KEY,
    automatic_rotation=False,
    subscription="default",
    region="default",
    tenant=None,
    identity=None,
    revocation=RevocationAction.SHUTDOWN,
    grace_seconds=0,
    created=datetime.now(UTC),
)


def create(kind: EncryptionType, content: Content | None) -> CreateDisk:
    key = PLATFORM_KEY if kind is EncryptionType.PLATFORM_KEY else CUSTOMER
    return CreateDisk("one", 1 << 30, Path("/images/one.qcow2"), DiskFormat.QCOW2, kind, key, content)


LOOKED_AT: dict[str, Callable[[Content], Operation]] = {
    "a customer's key": lambda content: create(EncryptionType.CUSTOMER_KEY, content),
    "double": lambda content: create(EncryptionType.PLATFORM_AND_CUSTOMER_KEYS, content),
    "moved to a customer's key": lambda content: MoveDisk(DISK, SET, content),
    "attached at host": lambda content: AttachDisk(DISK, "vm", True, content),
    "at host switched on": lambda content: UpdateVm("vm", OFF, ON, (DISK,), content),
}
NOT_LOOKED_AT: dict[str, Callable[[Content], Operation]] = {
    "the platform's key": lambda content: create(EncryptionType.PLATFORM_KEY, content),
    "moved from one customer's key to another": lambda content: MoveDisk(CUSTOMERS, SET, content),
    "attached": lambda content: AttachDisk(DISK, "vm", False, content),
    "at host switched off": lambda content: UpdateVm("vm", ON, OFF, (DISK,), content),
    "at host as before": lambda content: UpdateVm("vm", ON, ON, (DISK,), content),
}


class Looks:
    """A disk's content, and how often it was looked at."""

    def __init__(self, *findings: Finding) -> None:
        self.times = 0
        self.content = Content(self._look)
        self._findings = findings

    def _look(self) -> tuple[Finding, ...]:
        self.times += 1
        return self._findings


ENCRYPTED = Finding("gpt-2", 1 << 20, 1 << 20, EncryptionKind.LUKS2)


@pytest.mark.parametrize("name", LOOKED_AT)
def test_in_guest_encryption_is_refused_with_the_reason(name: str) -> None:
    looks = Looks(ENCRYPTED)
    with pytest.raises(PolicyError, match=r"it has in-guest encryption, LUKS2 \(gpt-2\)"):
        virt_sse_validate(LOOKED_AT[name](looks.content), Site())
    virt_sse_validate(LOOKED_AT[name](Looks().content), Site())
    virt_sse_validate(LOOKED_AT[name](looks.content), Site(enforce=False))
    assert looks.times == 1


@pytest.mark.parametrize("name", NOT_LOOKED_AT)
def test_operations_without_need_inspect_nothing(name: str) -> None:
    looks = Looks(ENCRYPTED)
    virt_sse_validate(NOT_LOOKED_AT[name](looks.content), Site())
    assert looks.times == 0


def test_an_empty_disk_passes() -> None:
    virt_sse_validate(create(EncryptionType.CUSTOMER_KEY, None), Site())
