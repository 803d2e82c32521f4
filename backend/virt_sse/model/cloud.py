"""Values of the cloud that a site follows: limits, exceptions, and the driver options of each SKU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from virt_sse.model.disks import DiskSku

_VERSION = re.compile(r".*?_?v(\d{1,3})(?:_Promo)?")


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """Options of a disk's driver in a domain definition, in libvirt's words (libvirt formatdomain).

    :ivar cache: cache mode of QEMU; ``None`` for libvirt's default.
    :ivar io: I/O mode of QEMU; ``None`` for libvirt's default.
    :ivar iothread: number of the domain's I/O thread that serves the disk; ``None`` for none.
    :ivar iotune: limits by the name of libvirt's element, e.g. ``total_iops_sec``.
    """

    cache: str | None = None
    io: str | None = None
    iothread: int | None = None
    iotune: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CloudProfile:
    """Values from a cloud's documents. The defaults limit nothing.

    :ivar name: name of the profile, or path of the site's own tables.
    :ivar date: date of the documents, e.g. ``2026-04``; empty if the tables have no date.
    :ivar sets_per_region: maximum number of disk encryption sets per subscription and region; ``None`` for no
        limit.
    :ivar spared_skus: a VM with a disk of these SKUs keeps running after a revocation.
    :ivar temp_disk_encrypted_from: VM sizes of this version and later encrypt their temporary disk by
        themselves; ``None`` for no such sizes.
    :ivar drivers: driver options by SKU; a SKU without options has libvirt's defaults.
    """

    name: str = "none"
    date: str = ""
    sets_per_region: int | None = None
    spared_skus: frozenset[DiskSku] = frozenset()
    temp_disk_encrypted_from: int | None = None
    drivers: Mapping[DiskSku, DriverOptions] = field(default_factory=dict)

    def encrypts_temp_disk(self, size: str | None) -> bool:
        """Whether a VM of *size* has an encrypted temporary disk without encryption at host."""
        version = size_version(size or "")
        return self.temp_disk_encrypted_from is not None and version >= self.temp_disk_encrypted_from


def size_version(size: str) -> int:
    """The version of a VM size or of a series, e.g. 5 of ``Standard_D2s_v5``; 1 for a size without one."""
    match = _VERSION.fullmatch(size)
    return int(match[1]) if match else 1
