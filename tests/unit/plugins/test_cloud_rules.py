"""The rules of a cloud, through the hook that enforces them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.errors import ConfigError, PolicyError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType
from virt_sse.model.operations import (
    AttachDisk,
    CreateDisk,
    CreateEncryptionSet,
    MoveDisk,
    Operation,
    StartVm,
    UpdateVm,
)
from virt_sse.model.vms import VmProperties
from virt_sse.plugins import PluginHost
from virt_sse_plugins.policies.tables import BUILT_IN, Tables

DOUBLE = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
KEY = KeyRef("customer-managed", "key")


def disk(sku: DiskSku = DiskSku.PREMIUM_SSD) -> Disk:
    return Disk(
        id=uuid.uuid4(),
        name="web",
        path=Path("/x"),
        format=DiskFormat.RAW,
        size=512,
        state=DiskState.READY,
        encryption_type=EncryptionType.CUSTOMER_KEY,
        created=datetime.now(UTC),
        generation=1,
        deks=(),
        sku=sku,
    )


def encryption_set(kind: EncryptionType) -> EncryptionSet:
    return EncryptionSet(
        id=uuid.uuid4(),
        name="set",
        key=KEY,
        key_version=None,
        encryption_type=kind,
        automatic_rotation=False,
        subscription="default",
        region="default",
        tenant=None,
        identity=None,
        revocation=RevocationAction.SHUTDOWN,
        grace_seconds=1,
        created=datetime.now(UTC),
    )


def create(kind: EncryptionType) -> CreateDisk:
    return CreateDisk("web", 512, Path("/x"), DiskFormat.RAW, kind, KEY)


def update(size: str | None = None, *, at_host: bool = True, disks: tuple[Disk, ...] = ()) -> UpdateVm:
    return UpdateVm("vm", VmProperties(), VmProperties(at_host, size), disks)


class Site:
    """A host with a configuration."""

    def __init__(self, root: Path, config: str) -> None:
        path = root / "etc/virt-sse/config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config)
        self._plugins = PluginHost(Config.load(root))

    def allows(self, *operations: Operation) -> None:
        for operation in operations:
            self._plugins.validate(operation)

    def refuses(self, operation: Operation, reason: str) -> None:
        with pytest.raises(PolicyError, match=reason):
            self._plugins.validate(operation)


def in_region(root: Path, region: str, more: str = "") -> Site:
    return Site(root, f'[host]\nregion = "{region}"\n{more}')


def test_a_site_without_rules_supports_everything(tmp_path: Path) -> None:
    Site(tmp_path, "").allows(
        create(DOUBLE),
        CreateEncryptionSet(encryption_set(DOUBLE)),
        update(),
        update("Standard_D2_v3"),
        update("our-own-size"),
    )


def test_a_region_allows_only_the_features_offered_there(tmp_path: Path) -> None:
    for region in ("westus2", "West US 2", "eastus", "southcentralus", "usgovvirginia", "usgovarizona"):
        in_region(tmp_path, region).allows(
            create(DOUBLE), CreateEncryptionSet(encryption_set(DOUBLE)), update()
        )
    for region in ("westus", "eastus2"):
        site = in_region(tmp_path, region)
        site.allows(
            update(),
            create(EncryptionType.CUSTOMER_KEY),
            MoveDisk(disk(), encryption_set(EncryptionType.CUSTOMER_KEY)),
        )
        for operation in (
            create(DOUBLE),
            CreateEncryptionSet(encryption_set(DOUBLE)),
            MoveDisk(disk(), encryption_set(DOUBLE)),
        ):
            site.refuses(operation, "does not support double encryption")
    elsewhere = in_region(tmp_path, "northeurope")
    elsewhere.refuses(update(), "'northeurope' does not support encryption at host")
    elsewhere.refuses(StartVm("vm", VmProperties(encryption_at_host=True), ()), "encryption at host")
    elsewhere.refuses(create(DOUBLE), "double encryption")
    elsewhere.allows(update(at_host=False), StartVm("vm", VmProperties(), ()))


def test_a_size_allows_only_the_features_of_its_series(tmp_path: Path) -> None:
    site = in_region(tmp_path, "westus2")
    site.allows(update("Standard_D2s_v3"), update("Standard_B2ms"), update("Standard_D2_v3", at_host=False))
    site.refuses(update("Standard_D2_v3"), "of series Dv3, does not support")
    site.refuses(update("Standard_X2"), "to no series")
    site.refuses(StartVm("vm", VmProperties(encryption_at_host=True, size="Standard_H8"), ()), "series H")


@pytest.mark.parametrize(
    ("size", "series"),
    [
        ("Standard_D2s_v3", "Dsv3"),
        ("Standard_DS11-1_v2", "DSv2"),
        ("Standard_D4a_v4", "Dav4"),
        ("Standard_D4as_v4", "Dasv4"),
        ("Standard_D4ds_v4", None),
        ("Standard_E4s_v4", None),
        ("Standard_M416ms_v2", "Mv2"),
        ("Standard_L8s", "Ls"),
        ("Standard_L4", "L"),
        ("Standard_NC6s_v2", "NCv2"),
        ("Standard_H16_Promo", "H"),
        ("Basic_A1", "A"),
        ("Dsv3", "Dsv3"),
        ("Standard_", None),
    ],
)
def test_a_size_belongs_to_a_series(size: str, series: str | None) -> None:
    found = Tables.load(None).series_of(size)
    assert (found.name if found else None) == series


def test_ultra_disks_do_not_go_with_encryption_at_host(tmp_path: Path) -> None:
    site = Site(tmp_path, "")
    ultra = disk(DiskSku.ULTRA)
    site.refuses(update(disks=(disk(), ultra)), "not supported with encryption at host")
    site.refuses(StartVm("vm", VmProperties(encryption_at_host=True), (ultra,)), "UltraSSD_LRS")
    site.refuses(AttachDisk(ultra, "vm", encryption_at_host=True), "UltraSSD_LRS")
    site.allows(update(disks=(disk(),)), update(disks=(ultra,), at_host=False), AttachDisk(ultra, "vm"))


def test_a_site_replaces_the_tables(tmp_path: Path) -> None:
    tables = tmp_path / "cloud.toml"
    tables.write_text(
        "[regions.default]\nencryption-at-host = true\ndouble-encryption = false\n"
        '[[sizes]]\ntype = "ours"\nsupported = ["small"]\nunsupported = ["large"]\n'
    )
    site = Site(tmp_path, f'[policy]\ntables = "{tables}"\n')
    site.allows(update("small"), update(disks=(disk(DiskSku.ULTRA),)))
    site.refuses(update("large"), "series large")
    site.refuses(create(DOUBLE), "double encryption")
    for content in (
        "[",
        "x = 1",
        "[regions.default]\nencryption-at-host = 1",
        '[[sizes]]\nsupported = ["a"]',
        '[[sizes]]\ntype = "ours"\nunsuported = ["large"]',
    ):
        tables.write_text(content)
        site.refuses(update(), "policy's tables")
    tables.unlink()
    site.refuses(update(), "cannot read the policy's tables")
    site.allows(create(EncryptionType.CUSTOMER_KEY))


def test_a_site_switches_the_rules_off(tmp_path: Path) -> None:
    site = in_region(tmp_path, "northeurope", "[policy]\nenforce = false\n")
    site.allows(create(DOUBLE), update("Standard_D2_v3", disks=(disk(DiskSku.ULTRA),)))
    with pytest.raises(ConfigError, match="true or false"):
        Site(tmp_path, '[policy]\nenforce = "no"\n')


def test_every_series_of_the_table_is_found_by_its_own_name() -> None:
    tables = Tables.load(BUILT_IN)
    assert len(tables.series) > 30
    for series in tables.series:
        assert tables.series_of(series.name) is not None
