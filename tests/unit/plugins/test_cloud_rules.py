"""The rules of a cloud, through the hook that enforces them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.errors import ConfigError, PolicyError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.cloud import CloudProfile, DriverOptions
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
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
from virt_sse_plugins.policies.tables import CURRENT, Tables

PROFILES = sorted(path.stem for path in CURRENT.parent.glob("*.toml"))
OF_2020 = '[policy]\nprofile = "2020"\n'
DOUBLE = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
KEY = KeyRef("customer-managed", "key")


WRAPPED = WrappedDek(b"x", "RSA-OAEP-256", KeyId(KEY.provider, KEY.name, "1"))


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
        deks=(DekEntry("service", AES_256_XTS, WRAPPED),),
        sku=sku,
    )


def encryption_set(kind: EncryptionType, key: KeyRef = KEY) -> EncryptionSet:
    return EncryptionSet(
        id=uuid.uuid4(),
        name="set",
        key=key,
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


def create(kind: EncryptionType, sku: DiskSku = DiskSku.PREMIUM_SSD) -> CreateDisk:
    return CreateDisk("web", 512, Path("/x"), DiskFormat.RAW, kind, KEY, sku=sku)


def update(size: str | None = None, *, at_host: bool = True, disks: tuple[Disk, ...] = ()) -> UpdateVm:
    return UpdateVm("vm", VmProperties(), VmProperties(at_host, size), disks)


class Site:
    """A host with a configuration."""

    def __init__(self, root: Path, config: str) -> None:
        path = root / "etc/virt-sse/config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config)
        self._plugins = PluginHost(Config.load(root))

    @property
    def profile(self) -> CloudProfile:
        return self._plugins.cloud_profile()

    def allows(self, *operations: Operation) -> None:
        for operation in operations:
            self._plugins.validate(operation)

    def refuses(self, operation: Operation, reason: str) -> None:
        with pytest.raises(PolicyError, match=reason):
            self._plugins.validate(operation)


def in_region(root: Path, region: str, more: str = OF_2020) -> Site:
    return Site(root, f'[host]\nregion = "{region}"\n{more}')


def test_a_site_without_rules_supports_everything(tmp_path: Path) -> None:
    Site(tmp_path, "").allows(
        create(DOUBLE),
        CreateEncryptionSet(encryption_set(DOUBLE)),
        update(),
        update("Standard_D2_v3"),
        update("our-own-size"),
    )


def test_the_current_profile_has_no_region_without_a_feature(tmp_path: Path) -> None:
    in_region(tmp_path, "northeurope", "").allows(create(DOUBLE), update(), update("Standard_D2s_v3"))


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
    ("size", "of_2020", "current"),
    [
        ("Standard_D2s_v3", "Dsv3", "Dsv3"),
        ("Standard_DS11-1_v2", "DSv2", "DSv2"),
        ("Standard_D4a_v4", "Dav4", "Dav4"),
        ("Standard_D4as_v4", "Dasv4", "Dasv4"),
        ("Standard_D4ds_v4", None, "Ddsv4"),
        ("Standard_E4s_v4", None, None),
        ("Standard_E104ids_v5", None, "Eidsv5"),
        ("Standard_D2s_v6", None, "Dsv6"),
        ("Standard_M416ms_v2", "Mv2", "Mv2"),
        ("Standard_L8s", "Ls", "Ls"),
        ("Standard_L4", "L", "L"),
        ("Standard_NC6s_v2", "NCv2", "NCv2"),
        ("Standard_H16_Promo", "H", "H"),
        ("Basic_A1", "A", "A"),
        ("Dsv3", "Dsv3", "Dsv3"),
        ("Standard_", None, None),
    ],
)
def test_a_size_belongs_to_a_series(size: str, of_2020: str | None, current: str | None) -> None:
    for profile, series in (("2020", of_2020), ("current", current)):
        found = Tables.load(CURRENT.with_name(f"{profile}.toml")).series_of(size)
        assert (found.name if found else None) == series


def test_ultra_disks_do_not_go_with_encryption_at_host_in_2020(tmp_path: Path) -> None:
    site = Site(tmp_path, OF_2020)
    ultra = disk(DiskSku.ULTRA)
    site.refuses(update(disks=(disk(), ultra)), "not supported with encryption at host")
    site.refuses(StartVm("vm", VmProperties(encryption_at_host=True), (ultra,)), "UltraSSD_LRS")
    site.refuses(AttachDisk(ultra, "vm", encryption_at_host=True), "UltraSSD_LRS")
    site.allows(update(disks=(disk(),)), update(disks=(ultra,), at_host=False), AttachDisk(ultra, "vm"))


def test_ultra_disks_go_with_encryption_at_host_and_not_with_double_encryption(tmp_path: Path) -> None:
    site = Site(tmp_path, "")
    for sku in (DiskSku.ULTRA, DiskSku.PREMIUM_SSD_V2):
        fast = disk(sku)
        site.allows(
            update(disks=(fast,)),
            StartVm("vm", VmProperties(encryption_at_host=True), (fast,)),
            AttachDisk(fast, "vm", encryption_at_host=True),
            create(EncryptionType.CUSTOMER_KEY, sku),
        )
        for operation in (create(DOUBLE, sku), MoveDisk(fast, encryption_set(DOUBLE))):
            site.refuses(operation, f"SKU {sku.value}, not supported with double encryption")
    Site(tmp_path, OF_2020).allows(create(DOUBLE, DiskSku.ULTRA))


def test_a_profile_has_limits_and_the_date_of_its_source(tmp_path: Path) -> None:
    current = Site(tmp_path, "").profile
    assert (current.name, current.date, current.sets_per_region) == ("current", "2026-04", 5000)
    assert current.spared_skus == frozenset()
    assert current.encrypts_temp_disk("Standard_D2ds_v5")
    assert current.encrypts_temp_disk("Standard_E4ads_v6")
    assert not current.encrypts_temp_disk("Standard_D2ds_v4")
    assert not current.encrypts_temp_disk(None)
    of_2020 = Site(tmp_path, OF_2020).profile
    assert (of_2020.name, of_2020.date, of_2020.sets_per_region) == ("2020", "2020-07", 50)
    assert of_2020.spared_skus == {DiskSku.ULTRA}
    assert not of_2020.encrypts_temp_disk("Standard_D2ds_v5")
    off = Site(tmp_path, f"{OF_2020}enforce = false\n").profile
    assert (off.sets_per_region, off.spared_skus) == (None, frozenset())


def test_a_profile_that_does_not_exist_permits_nothing(tmp_path: Path) -> None:
    for name in ("1999", "../policies/2020", "tables"):
        site = Site(tmp_path, f'[policy]\nprofile = "{name}"\n')
        site.refuses(update(), "no profile")
        with pytest.raises(PolicyError, match="no profile"):
            _ = site.profile


def test_a_customer_managed_key_cannot_be_turned_off(tmp_path: Path) -> None:
    platform = encryption_set(EncryptionType.CUSTOMER_KEY, KeyRef("platform-managed", "default"))
    site = Site(tmp_path, "")
    site.refuses(MoveDisk(disk(), platform), "customer-managed keys cannot be turned off")
    site.allows(MoveDisk(disk(), encryption_set(EncryptionType.CUSTOMER_KEY, KeyRef("hsm-simulated", "key"))))


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
    with pytest.raises(PolicyError, match="cannot read the policy's tables"):
        _ = site.profile
    site.allows(create(EncryptionType.CUSTOMER_KEY))


def test_a_site_switches_the_rules_off(tmp_path: Path) -> None:
    site = in_region(tmp_path, "northeurope", f"{OF_2020}enforce = false\n")
    site.allows(create(DOUBLE), update("Standard_D2_v3", disks=(disk(DiskSku.ULTRA),)))
    with pytest.raises(ConfigError, match="true or false"):
        Site(tmp_path, '[policy]\nenforce = "no"\n')


@pytest.mark.parametrize("profile", PROFILES)
def test_every_series_of_the_table_is_found_by_its_own_name(profile: str) -> None:
    tables = Tables.load(CURRENT.with_name(f"{profile}.toml"))
    assert len(tables.series) > 30
    for series in tables.series:
        assert tables.series_of(series.name) is not None


def test_every_sku_has_driver_options_that_a_site_may_replace(tmp_path: Path) -> None:
    drivers = Site(tmp_path, "").profile.drivers
    assert drivers.keys() == set(DiskSku)
    assert drivers[DiskSku.PREMIUM_SSD] == DriverOptions()
    assert drivers[DiskSku.ULTRA] == DriverOptions(cache="none", io="native")
    assert drivers[DiskSku.STANDARD_HDD].iotune == {"total_iops_sec": 500, "total_bytes_sec": 60_000_000}
    tables = tmp_path / "cloud.toml"
    site = f'[policy]\ntables = "{tables}"\n'
    tables.write_text("[skus.Premium_LRS]\niothread = 2\niotune.read-iops-sec = 9\n")
    expected = DriverOptions(iothread=2, iotune={"read_iops_sec": 9})
    assert Site(tmp_path, site).profile.drivers == {DiskSku.PREMIUM_SSD: expected}
    for wrong in (
        'Premium_LRS.cache = "unsafe"',
        "Premium_LRS.iothread = 0",
        "Premium_LRS.iotune.speed = 1",
        "Premium_LRS.iotune.total-iops-sec = -1",
        "Gold_LRS = {}",
    ):
        tables.write_text(f"[skus]\n{wrong}\n")
        with pytest.raises(PolicyError, match="are invalid"):
            _ = Site(tmp_path, site).profile
