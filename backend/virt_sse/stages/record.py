"""What a host notes of a disk's stages, so that any later command can go on with them or end them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import HostCaching
from virt_sse.system.files import private_folder, write_private


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The stages of a disk in a domain.

    :ivar owner: whose the image was before.
    :ivar qemu: whom the domain's QEMU runs as; and
    :ivar storage: the stages.
    :ivar guest_slot: of the DEK that the guest's QEMU has.
    :ivar storage_slot: of the DEK that the storage daemon opens the image with; ``None`` without a daemon.
    """

    disk_id: UUID
    domain_id: UUID
    domain: str
    image: Path
    format: DiskFormat
    owner: User
    qemu: User
    storage: User
    caching: HostCaching
    guest_slot: str
    storage_slot: str | None

    @property
    def has_cache(self) -> bool:
        return self.caching is not HostCaching.NONE

    @property
    def keeps_all(self) -> bool:
        """Whether what a stage has acknowledged outlives it, so that it may be started anew under a guest.

        A raw volume's writes, and those that go through a read-only cache, are in the kernel's page cache by
        then. A qcow2 volume's metadata and a write-back cache are in the process until the guest asks for a
        flush: a new process would answer with older data, and the guest would never know.
        """
        if self.caching is HostCaching.READ_WRITE:
            return False
        return self.storage_slot is None or self.format is DiskFormat.RAW

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in *folder*; ``None`` when there is none that makes sense."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            fields = json.loads((folder / "stages.json").read_bytes())
            return cls(
                disk_id=UUID(fields["disk"]),
                domain_id=UUID(fields["domain-id"]),
                domain=fields["domain"],
                image=Path(fields["image"]),
                format=DiskFormat(fields["format"]),
                owner=User(*fields["owner"]),
                qemu=User(*fields["qemu"]),
                storage=User(*fields["storage"]),
                caching=HostCaching(fields["caching"]),
                guest_slot=fields["guest-slot"],
                storage_slot=fields["storage-slot"],
            )
        return None

    def write(self, folder: Path) -> None:
        """Make it durable in *folder*.

        :raise OSError: When it cannot be written.
        """
        private_folder(folder.parent)
        private_folder(folder)
        fields = {
            "disk": str(self.disk_id),
            "domain-id": str(self.domain_id),
            "domain": self.domain,
            "image": str(self.image),
            "format": self.format.value,
            "owner": [self.owner.uid, self.owner.gid],
            "qemu": [self.qemu.uid, self.qemu.gid],
            "storage": [self.storage.uid, self.storage.gid],
            "caching": self.caching.value,
            "guest-slot": self.guest_slot,
            "storage-slot": self.storage_slot,
        }
        write_private(folder / "stages.json", json.dumps(fields).encode())
