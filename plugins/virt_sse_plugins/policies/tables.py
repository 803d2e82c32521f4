"""What is supported where, from a TOML file: the one beside this, which says what it may hold, or a site's
own.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from virt_sse.api import DiskSku, PolicyError

BUILT_IN = Path(__file__).with_name("cloud.toml")

OWN_REGION = "default"
"""The region of a site that has not said where it is."""

_SIZE = re.compile(r"(?:Standard|Basic)_([A-Z]+)\d+(?:-\d+)?([a-z]*)(?:_[A-Z]+\d+)?(?:_(v\d+))?(?:_Promo)?")


@dataclass(frozen=True, slots=True)
class Region:
    """:ivar name: for people."""

    name: str
    encryption_at_host: bool
    double_encryption: bool


@dataclass(frozen=True, slots=True)
class Series:
    """A series of VM sizes, e.g. ``Dsv3``."""

    name: str
    type: str
    encryption_at_host: bool
    note: str | None


@dataclass(frozen=True, slots=True)
class Tables:
    """All of a file.

    :ivar skus_without_at_host: what a VM with encryption at host cannot have.
    """

    regions: Mapping[str, Region]
    series: tuple[Series, ...]
    skus_without_at_host: frozenset[DiskSku]

    @classmethod
    def load(cls, path: Path | None) -> Self:
        """Read *path*; without one, what comes with virt-sse.

        :raise PolicyError: When it cannot be read, or holds what it may not: tables that nobody can read
            permit nothing.
        """
        path = path or BUILT_IN
        try:
            return cls._parse(tomllib.loads(path.read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise PolicyError(f"cannot read the policy's tables {path}: {exc}") from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise PolicyError(
                f"the policy's tables {path} make no sense: {type(exc).__name__}: {exc}",
                hint=f"{BUILT_IN} shows what they may hold",
            ) from exc

    @classmethod
    def _parse(cls, document: dict[str, Any]) -> Self:
        """:raise ValueError: When it is no such table; likewise KeyError, TypeError and AttributeError."""
        regions, sizes = document.pop("regions", {}), document.pop("sizes", [])
        notes, at_host = document.pop("notes", {}), document.pop("encryption-at-host", {})
        if document:
            raise ValueError(f"unknown table {min(document)!r}")
        series = []
        for table in sizes:
            supported = [(name, True) for name in table.get("supported", [])]
            unsupported = [(name, False) for name in table.get("unsupported", [])]
            for name, at_host_too in supported + unsupported:
                series.append(Series(_text(name), _text(table["type"]), at_host_too, notes.get(name)))
        return cls(
            regions={
                normal(key): Region(
                    _text(table.get("name", key)),
                    _flag(table["encryption-at-host"]),
                    _flag(table["double-encryption"]),
                )
                for key, table in regions.items()
            },
            series=tuple(series),
            skus_without_at_host=frozenset(map(DiskSku, at_host.get("unsupported-skus", []))),
        )

    def governs(self, region: str) -> bool:
        """Whether the rules on sizes and regions hold in *region*."""
        return normal(region) != OWN_REGION or OWN_REGION in self.regions

    def region(self, name: str) -> Region:
        """What a region supports."""
        return self.regions.get(normal(name)) or Region(
            name, encryption_at_host=False, double_encryption=False
        )

    def series_of(self, size: str) -> Series | None:
        """The series that a size belongs to; *size* may also be the name of one."""
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
        # Some series have no features in their name, e.g. B, of Standard_B2ms. Not where features make a
        # series.
        if any(re.fullmatch(f"{family}[a-uw-z][a-z]*{version}", name) for name in by_name):
            return None
        return by_name.get(family + version)


def normal(region: str) -> str:
    """A region's name as it is compared: ``West US 2`` is ``westus2``."""
    return region.replace(" ", "").lower()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value
