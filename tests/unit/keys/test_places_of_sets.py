"""Disks under customers' keys stay in their subscription and region, and under such keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.errors import PolicyError
from virt_sse.keys.encryption_sets import refuse_moved
from virt_sse.model.disks import NewDisk
from virt_sse.model.layers import EncryptionType

M = 1 << 20


def configured(root: Path, text: str) -> Config:
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Config.load(root)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ('subscription = "other"', "cannot move from subscription 'default' to subscription 'other'"),
        ('region = "westus2"', "is in region 'default', this host's VMs are in region 'westus2'"),
    ],
)
def test_a_disk_in_a_set_does_not_move_to_another_place(
    root: Path, backend: Backend, place: str, reason: str
) -> None:
    made = backend.sets.create("web", provider="platform-managed", key="default")
    disk = backend.disks.create(NewDisk(name="one", size=M, encryption_set="web"))
    free = backend.disks.create(NewDisk(name="free", size=M))
    for each in (disk, free):
        backend.host.store.remove(each.id)
    config = configured(root, f"[host]\n{place}\n")
    with Backend(config) as moved:
        with pytest.raises(PolicyError, match=reason):
            moved.disks.adopt(disk.path)
        with pytest.raises(PolicyError, match="set 'web' is in subscription"):
            moved.disks.create(NewDisk(name="two", size=M, encryption_set="web"))
        assert moved.disks.adopt(free.path).name == "free"
    with pytest.raises(PolicyError, match=reason):
        refuse_moved(disk, made, config)
    refuse_moved(free, None, config)


def test_a_disk_does_not_leave_all_sets(backend: Backend) -> None:
    backend.sets.create("web", provider="platform-managed", key="default")
    backend.disks.create(NewDisk(name="one", size=M, encryption_set="web"))
    free = backend.disks.create(NewDisk(name="free", size=M))
    with pytest.raises(PolicyError, match="customer-managed keys cannot be turned off"):
        backend.sets.use_platform_key("one")
    assert backend.sets.use_platform_key("free") == free
    assert backend.disks.get("one").encryption_type is EncryptionType.CUSTOMER_KEY


def test_the_profile_limits_the_sets_of_a_region_unless_configured(root: Path, backend: Backend) -> None:
    assert backend.host.plugins.cloud_profile().sets_per_region == 5000
    with Backend(configured(root, "[encryption-sets]\nlimit = 1\n")) as limited:
        limited.sets.create("one", provider="platform-managed", key="default")
        with pytest.raises(PolicyError, match="more are not allowed"):
            limited.sets.create("two", provider="platform-managed", key="default")
    tables = root / "cloud.toml"
    tables.write_text("[limits]\nsets-per-region = 2\n")
    with Backend(configured(root, f'[policy]\ntables = "{tables}"\n')) as limited:
        limited.sets.create("two", provider="platform-managed", key="default")
        with pytest.raises(PolicyError, match="has 2 disk encryption sets"):
            limited.sets.create("three", provider="platform-managed", key="default")
