"""The enforcement for a domain follows from its disks' encryption sets."""

from __future__ import annotations

import dataclasses
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virt_sse.agent.revocation import Enforcement, RevokedDisk, strictest_enforcement
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType

SHUTDOWN, DESTROY = RevocationAction.SHUTDOWN, RevocationAction.DESTROY
PAUSE, NONE = RevocationAction.PAUSE, RevocationAction.NONE
NOW = datetime(2025, 1, 1, tzinfo=UTC)

DISK = Disk(
    id=uuid.uuid4(),
    name="disk",
    path=Path("/images/disk"),
    format=DiskFormat.QCOW2,
    size=512,
    state=DiskState.READY,
    encryption_type=EncryptionType.CUSTOMER_KEY,
    created=NOW,
    generation=1,
    deks=(),
)


def revoked(
    action: RevocationAction | None, grace: int = 60, sku: DiskSku = DiskSku.PREMIUM_SSD
) -> RevokedDisk:
    disk = dataclasses.replace(DISK, sku=sku)
    if action is None:
        return RevokedDisk(disk, None, "disabled")
    encryption_set = EncryptionSet(
        id=uuid.uuid4(),
        name="set",
        key=KeyRef("provider", "key"),
        key_version=None,
        encryption_type=EncryptionType.CUSTOMER_KEY,
        automatic_rotation=False,
        subscription="default",
        region="default",
        tenant=None,
        identity=None,
        revocation=action,
        grace_seconds=grace,
        created=NOW,
    )
    return RevokedDisk(disk, encryption_set, "disabled")


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        ([revoked(SHUTDOWN, 60)], Enforcement(SHUTDOWN, 60)),
        ([revoked(SHUTDOWN, 0)], Enforcement(DESTROY)),
        ([revoked(DESTROY)], Enforcement(DESTROY)),
        ([revoked(PAUSE)], Enforcement(PAUSE)),
        ([revoked(NONE)], Enforcement(NONE)),
        ([revoked(None)], Enforcement(SHUTDOWN, 60)),
        ([revoked(SHUTDOWN, 60), revoked(SHUTDOWN, 5)], Enforcement(SHUTDOWN, 5)),
        ([revoked(PAUSE), revoked(SHUTDOWN, 60), revoked(NONE)], Enforcement(SHUTDOWN, 60)),
        ([revoked(NONE), revoked(PAUSE)], Enforcement(PAUSE)),
        ([revoked(SHUTDOWN, 5), revoked(DESTROY)], Enforcement(DESTROY)),
        ([revoked(DESTROY, sku=DiskSku.ULTRA)], Enforcement(DESTROY)),
    ],
)
def test_the_strongest_enforcement_action_is_taken(disks: list[RevokedDisk], expected: Enforcement) -> None:
    assert strictest_enforcement(disks) == expected
    assert strictest_enforcement(disks[::-1]) == expected


@pytest.mark.parametrize(
    ("disks", "expected"),
    [
        ([revoked(DESTROY, sku=DiskSku.ULTRA)], Enforcement(NONE)),
        ([revoked(DESTROY, sku=DiskSku.ULTRA), revoked(PAUSE)], Enforcement(PAUSE)),
        ([revoked(DESTROY)], Enforcement(DESTROY)),
    ],
)
def test_a_cloud_profile_may_spare_domains_with_disks_of_a_sku(
    disks: list[RevokedDisk], expected: Enforcement
) -> None:
    assert strictest_enforcement(disks, {DiskSku.ULTRA}) == expected
