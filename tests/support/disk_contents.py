"""Disks with a known content, and the content of disks and copies."""

from __future__ import annotations

from pathlib import Path

from virt_sse.backend import Backend
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu.reading import plaintext

M = 1 << 20
CONTENT = (b"the content of a disk, again and again. " * M)[: M + 512]
"""An odd number of sectors."""


def decrypted(backend: Backend, disk: Disk) -> bytes:
    """The content as a guest sees it, whether or not in use."""
    base = unlocked_base(backend.host, disk)
    with plaintext(disk.path, disk.format, backend.host.keys.unwrap_all(disk), base=base) as reader:
        return reader.read(0, reader.size)


def new_disk(backend: Backend, root: Path, layers: str = "single", image_format: str = "qcow2") -> Disk:
    """The disk ``web`` with :data:`CONTENT`, ``single`` or ``double``, under the platform's key."""
    plain = root / "plain"
    plain.write_bytes(CONTENT)
    if layers == "double":
        backend.sets.create(
            "double",
            provider="platform-managed",
            key="default",
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
        )
    new = NewDisk(
        name="web",
        format=DiskFormat(image_format),
        encryption_set="double" if layers == "double" else None,
    )
    return backend.transfer.import_image(new, plain, source_format="raw")
