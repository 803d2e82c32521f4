"""The flags of a migration to this host, as libvirt notes them in the domain's status file.

No hook gets the flags of ``virsh migrate``. While a job is under way, libvirt's status file of the domain
has the flags (``virDomainMigrateFlags`` of libvirt's API) of the call that began the job.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.errors import InvalidValueError, VmStateError
from virt_sse.libvirt.xml import parse_xml


class _Flag(enum.IntFlag):
    """Flags of ``virDomainMigrateFlags``."""

    NON_SHARED_DISK = 1 << 6
    NON_SHARED_INC = 1 << 7
    TLS = 1 << 16


@dataclass(frozen=True, slots=True)
class MigrationFlags:
    """What a migration to this host does.

    :ivar copies_disks: ``--copy-storage-all``.
    :ivar copies_changes_alone: ``--copy-storage-inc``: what a disk's image has, without that of images below.
    :ivar has_tls: ``--tls``: memory and contents of disks are encrypted on their way.
    """

    copies_disks: bool
    copies_changes_alone: bool
    has_tls: bool

    @property
    def copies_any(self) -> bool:
        """Whether the contents of disks, or changes, are copied."""
        return self.copies_disks or self.copies_changes_alone

    @classmethod
    def of(cls, status_file: Path) -> Self:
        """Read the flags of the migration under way from libvirt's status file of the domain.

        :raise VmStateError: When the file has no such flags.
        """
        try:
            root = parse_xml(status_file.read_text(), kind="status of a domain")
        except (OSError, ValueError, InvalidValueError) as exc:
            raise VmStateError(f"cannot read {status_file}: {exc}") from exc
        job = root.find("./job[@async='migration in']")
        try:
            flags = _Flag(int(job.get("flags", ""), 0) if job is not None else int(""))
        except ValueError as exc:
            raise VmStateError(f"{status_file} does not say how the domain migrates") from exc
        return cls(_Flag.NON_SHARED_DISK in flags, _Flag.NON_SHARED_INC in flags, _Flag.TLS in flags)
