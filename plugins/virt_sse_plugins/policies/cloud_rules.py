"""Rules of a cloud: features supported by regions and VM sizes, and features excluding each other."""

from __future__ import annotations

import dataclasses

from virt_sse.api import (
    PLATFORM_KEY,
    AttachDisk,
    CloudProfile,
    CreateDisk,
    CreateEncryptionSet,
    Disk,
    DiskKind,
    DiskSku,
    EncryptionSet,
    EncryptionType,
    MoveDisk,
    Operation,
    PolicyError,
    Site,
    StartVm,
    UpdateVm,
    VmProperties,
)
from virt_sse_plugins.policies.tables import Tables


def validate(operation: Operation, site: Site) -> None:
    """Refuse *operation* if a rule forbids it.

    :raise PolicyError: When a rule forbids the operation, or the site's tables cannot be read.
    """
    match operation:
        case CreateDisk(encryption_type=kind):
            _check_double(kind, site)
            _check_double_sku(kind, operation.name, operation.sku, site)
            _check_source(operation)
        case CreateEncryptionSet(encryption_set=made):
            _check_double(made.encryption_type, site)
        case MoveDisk(disk=disk, encryption_set=target):
            _check_double(target.encryption_type, site)
            _check_double_sku(target.encryption_type, disk.name, disk.sku, site)
            _check_not_turned_off(disk, target)
        case UpdateVm(after=properties) | StartVm(properties=properties) if properties.encryption_at_host:
            tables = Tables.of(site)
            _check_region(tables, site)
            _check_size(tables, properties, site)
            for disk in operation.disks:
                _check_sku(tables, disk)
        case AttachDisk(disk=disk, encryption_at_host=True):
            _check_sku(Tables.of(site), disk)


def profile(site: Site) -> CloudProfile:
    """The limits and exceptions of the site's tables; without limits if the rules are not enforced.

    :raise PolicyError: When the site's tables cannot be read.
    """
    found = Tables.of(site).profile
    if site.enforce:
        return found
    return dataclasses.replace(found, sets_per_region=None, spared_skus=frozenset())


def _check_double(kind: EncryptionType, site: Site) -> None:
    if kind is not EncryptionType.PLATFORM_AND_CUSTOMER_KEYS:
        return
    tables = Tables.of(site)
    if tables.governs(site.region) and not tables.region(site.region).double_encryption:
        raise PolicyError(f"region {tables.region(site.region).name!r} does not support double encryption")


def _check_source(operation: CreateDisk) -> None:
    """Keep a snapshot, an image, and each disk made of them, under the customer's key of the source."""
    source, kinds = operation.source, (DiskKind.SNAPSHOT, DiskKind.IMAGE)
    if source is None or not (operation.kind in kinds or source.kind in kinds):
        return
    if source.encryption_type is not EncryptionType.PLATFORM_KEY and operation.key != source.key:
        raise PolicyError(
            f"{operation.kind.title} {operation.name!r} must be under the key of {source.kind.title} "
            f"{source.name!r}, {source.key}",
            hint="choose a disk encryption set with this key",
        )


def _check_double_sku(kind: EncryptionType, name: str, sku: DiskSku, site: Site) -> None:
    if kind is EncryptionType.PLATFORM_AND_CUSTOMER_KEYS and sku in Tables.of(site).skus_without_double:
        raise PolicyError(f"disk {name!r} has SKU {sku.value}, not supported with double encryption")


def _check_not_turned_off(disk: Disk, target: EncryptionSet) -> None:
    """Refuse to move a disk from a customer's key to the platform's keys.

    A disk may leave a set whose key is the platform's.
    """
    if target.key.provider == PLATFORM_KEY.provider and disk.key.provider != PLATFORM_KEY.provider:
        raise PolicyError(
            f"disk {disk.name!r} is under a customer's key: customer-managed keys cannot be turned off",
            hint=f"copy the disk: 'virt-sse disk copy {disk.name} NEW --des {target.name}'",
        )


def _check_region(tables: Tables, site: Site) -> None:
    if tables.governs(site.region) and not tables.region(site.region).encryption_at_host:
        raise PolicyError(f"region {tables.region(site.region).name!r} does not support encryption at host")


def _check_size(tables: Tables, properties: VmProperties, site: Site) -> None:
    if not tables.governs(site.region) or properties.size is None:
        return
    series = tables.series_of(properties.size)
    if series is None:
        raise PolicyError(
            f"size {properties.size!r} belongs to no series known to support encryption at host",
            hint="list the supported series with 'virt-sse vm sizes'",
        )
    if not series.encryption_at_host:
        raise PolicyError(
            f"size {properties.size!r}, of series {series.name}, does not support encryption at host",
            hint="list the supported series with 'virt-sse vm sizes'",
        )


def _check_sku(tables: Tables, disk: Disk) -> None:
    if disk.sku in tables.skus_without_at_host:
        raise PolicyError(
            f"disk {disk.name!r} has SKU {disk.sku.value}, not supported with encryption at host"
        )
