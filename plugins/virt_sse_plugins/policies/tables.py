"""Features supported by regions, VM sizes and disk SKUs, from a TOML file.

The file is the built-in ``cloud.toml`` beside this module, with comments on its format, or a site's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from virt_sse.api import DiskSku, DocumentError, PolicyError, from_toml

BUILT_IN = Path(__file__).with_name("cloud.toml")

OWN_REGION = "default"
"""The region of a site without a configured region."""

_SIZE = re.compile(r"(?:Standard|Basic)_([A-Z]+)\d+(?:-\d+)?([a-z]*)(?:_[A-Z]+\d+)?(?:_(v\d+))?(?:_Promo)?")


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


class _AtHost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    unsupported_skus: frozenset[DiskSku] = frozenset()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    regions: dict[str, Region] = {}
    sizes: tuple[_Sizes, ...] = ()
    notes: dict[str, str] = {}
    encryption_at_host: _AtHost = _AtHost()


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
    """

    regions: Mapping[str, Region]
    series: tuple[Series, ...]
    skus_without_at_host: frozenset[DiskSku]

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read *path*, or the built-in file.

        :raise PolicyError: When the file cannot be read or is invalid: unreadable tables permit nothing.
        """
        path = path or BUILT_IN
        try:
            file = from_toml(path.read_bytes(), _File)
        except OSError as exc:
            raise PolicyError(f"cannot read the policy's tables {path}: {exc}") from exc
        except DocumentError as exc:
            raise PolicyError(
                f"the policy's tables {path} are invalid: {exc}", hint=f"see {BUILT_IN} for the format"
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
        )

    def governs(self, region: str) -> bool:
        """Whether the rules on sizes and regions apply in *region*."""
        return normal(region) != OWN_REGION or OWN_REGION in self.regions

    def region(self, name: str) -> Region:
        """Features of a region; an unknown region supports nothing."""
        return self.regions.get(normal(name)) or Region(
            name=name, encryption_at_host=False, double_encryption=False
        )

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
        # Some series have no features in their name: Standard_B2ms belongs to B. Ignore the size's features,
        # but only if no series of this family and version has features in its name.
        if any(re.fullmatch(f"{family}[a-uw-z][a-z]*{version}", name) for name in by_name):
            return None
        return by_name.get(family + version)


def normal(region: str) -> str:
    """A region's name in normal form for comparison: ``West US 2`` becomes ``westus2``."""
    return region.replace(" ", "").lower()
