"""Features supported by regions, VM sizes and disk SKUs, and limits, from a TOML file.

The file is a profile beside this module, or a site's own. ``current.toml`` has comments on the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from virt_sse.api import (
    CloudProfile,
    DiskSku,
    DocumentError,
    DriverOptions,
    PolicyError,
    Site,
    from_toml,
    size_version,
)

CURRENT = Path(__file__).with_name("current.toml")
"""The profile of a site without a configured profile."""

OWN_REGION = "default"
"""The region of a site without a configured region."""

_ANY_REGION = "*"

_SIZE = re.compile(r"(?:Standard|Basic)_([A-Z]+)\d+(?:-\d+)?([a-z]*)(?:_[A-Z]+\d+)?(?:_(v\d+))?(?:_Promo)?")


_Limit = Literal[
    "total-bytes-sec",
    "read-bytes-sec",
    "write-bytes-sec",
    "total-iops-sec",
    "read-iops-sec",
    "write-iops-sec",
]
"""Limits of libvirt's ``<iotune>``."""


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Features supported by a region.

    :ivar name: display name.
    """

    encryption_at_host: bool
    double_encryption: bool
    name: str = ""


class _Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    supported: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()


class _Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    unsupported_skus: frozenset[DiskSku] = frozenset()


class _Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    date: str = ""
    title: str = ""


class _Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    sets_per_region: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _Revocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    spared_skus: frozenset[DiskSku] = frozenset()


class _Versions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    encryption_at_host_from: int | None = None
    temporary_disk_encrypted_from: int | None = None


class _Sku(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    cache: Literal["none", "writeback", "writethrough", "directsync"] | None = None
    io: Literal["native", "threads", "io_uring"] | None = None
    iothread: Annotated[int, msgspec.Meta(ge=1)] | None = None
    iotune: dict[_Limit, Annotated[int, msgspec.Meta(ge=1)]] = {}

    def options(self) -> DriverOptions:
        limits = {name.replace("-", "_"): value for name, value in self.iotune.items()}
        return DriverOptions(self.cache, self.io, self.iothread, limits)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    regions: dict[str, Region] = {}
    sizes: tuple[_Sizes, ...] = ()
    notes: dict[str, str] = {}
    encryption_at_host: _Feature = _Feature()
    double_encryption: _Feature = _Feature()
    source: _Source = _Source()
    limits: _Limits = _Limits()
    revocation: _Revocation = _Revocation()
    versions: _Versions = _Versions()
    skus: dict[DiskSku, _Sku] = {}


@dataclass(frozen=True, slots=True)
class Series:
    """A series of VM sizes, e.g. ``Dsv3``."""

    name: str
    type: str
    encryption_at_host: bool
    note: str | None


@dataclass(frozen=True, slots=True)
class Tables:
    """All tables of a file.

    :ivar skus_without_at_host: SKUs not allowed for disks of a VM with encryption at host.
    :ivar skus_without_double: SKUs not allowed for disks with double encryption.
    :ivar at_host_from: sizes of no series support encryption at host from this version on.
    :ivar profile: limits and exceptions.
    """

    regions: Mapping[str, Region]
    series: tuple[Series, ...]
    skus_without_at_host: frozenset[DiskSku]
    skus_without_double: frozenset[DiskSku]
    at_host_from: int | None
    profile: CloudProfile

    @classmethod
    def of(cls, site: Site) -> Self:
        """Read the tables of *site*: its own file, or a profile.

        :raise PolicyError: As :meth:`load`, and when no profile has the configured name.
        """
        if site.tables:
            return cls.load(site.tables)
        profiles = {path.stem: path for path in CURRENT.parent.glob("*.toml")}
        if site.profile not in profiles:
            raise PolicyError(
                f"no profile {site.profile[:40]!r} of the cloud's rules",
                hint=f"'profile' in [policy] is one of {', '.join(sorted(profiles))}",
            )
        found = cls.load(profiles[site.profile])
        return replace(found, profile=replace(found.profile, name=site.profile))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read *path*.

        :raise PolicyError: When the file cannot be read or is invalid: unreadable tables permit nothing.
        """
        try:
            file = from_toml(path.read_bytes(), _File)
        except OSError as exc:
            raise PolicyError(f"cannot read the policy's tables {path}: {exc}") from exc
        except DocumentError as exc:
            raise PolicyError(
                f"the policy's tables {path} are invalid: {exc}", hint=f"see {CURRENT} for the format"
            ) from exc
        return cls(
            regions={
                normal(key): msgspec.structs.replace(region, name=region.name or key)
                for key, region in file.regions.items()
            },
            series=tuple(
                Series(name, sizes.type, is_supported, file.notes.get(name))
                for sizes in file.sizes
                for names, is_supported in ((sizes.supported, True), (sizes.unsupported, False))
                for name in names
            ),
            skus_without_at_host=file.encryption_at_host.unsupported_skus,
            skus_without_double=file.double_encryption.unsupported_skus,
            at_host_from=file.versions.encryption_at_host_from,
            profile=CloudProfile(
                name=str(path),
                date=file.source.date,
                sets_per_region=file.limits.sets_per_region,
                spared_skus=file.revocation.spared_skus,
                temp_disk_encrypted_from=file.versions.temporary_disk_encrypted_from,
                drivers={sku: options.options() for sku, options in file.skus.items()},
            ),
        )

    def governs(self, region: str) -> bool:
        """Whether the rules on sizes and regions apply in *region*."""
        return normal(region) != OWN_REGION or OWN_REGION in self.regions

    def region(self, name: str) -> Region:
        """Features of a region; an unknown region supports nothing."""
        if found := self.regions.get(normal(name)):
            return found
        if found := self.regions.get(_ANY_REGION):
            return msgspec.structs.replace(found, name=name)
        return Region(name=name, encryption_at_host=False, double_encryption=False)

    def series_of(self, size: str) -> Series | None:
        """The series of a VM size; *size* may also be the name of a series."""
        by_name = {series.name: series for series in reversed(self.series)}
        if size in by_name:
            return by_name[size]
        match = _SIZE.fullmatch(size)
        if not match:
            return None
        family, features, version = match[1], match[2], match[3] or ""
        exact = by_name.get(family + features + version)
        if exact:
            return exact
        if self.at_host_from is not None and size_version(version) >= self.at_host_from:
            return Series(family + features + version, "by version", encryption_at_host=True, note=None)
        # Some series have no features in their name: Standard_B2ms belongs to B. Ignore the size's features,
        # but only if no series of this family and version has features in its name.
        if any(re.fullmatch(f"{family}[a-uw-z][a-z]*{version}", name) for name in by_name):
            return None
        return by_name.get(family + version)


def normal(region: str) -> str:
    """A region's name in normal form for comparison: ``West US 2`` becomes ``westus2``."""
    return region.replace(" ", "").lower()
