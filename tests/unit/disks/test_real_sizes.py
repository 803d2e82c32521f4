"""Disks whose sizes others have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import images
from virt_sse.backend import Backend
from virt_sse.errors import InvalidValueError
from virt_sse.host.setup import initialise
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import img

M = 1 << 20


@pytest.mark.parametrize("image_format", DiskFormat)
@pytest.mark.parametrize("layers", [1, 2])
def test_no_size_in_the_store_shrinks_or_cuts_a_disk(
    root: Path, image_format: DiskFormat, layers: int
) -> None:
    images.require("qemu-img", "cryptsetup")
    with Backend.open(root) as backend:
        initialise(backend.host)
        made = backend.sets.create(
            "set",
            provider=PLATFORM_KEY.provider,
            key=PLATFORM_KEY.name,
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
            if layers == 2
            else EncryptionType.CUSTOMER_KEY,
        )
        disk = backend.disks.create(
            NewDisk(name="web", size=M, format=image_format, encryption_set=made.name)
        )

        def stored() -> int:
            return backend.host.store.get("web").size

        grow(backend, disk, 4 * M)
        assert stored() == M
        with pytest.raises(InvalidValueError, match="has 4194304 bytes"):
            backend.disks.resize("web", 2 * M)
        assert stored() == 4 * M
        grow(backend, disk, 5 * M)
        copy = backend.copies.copy(
            [NewDisk(name="copy", format=image_format, encryption_set=made.name, source=disk)]
        )
        assert (copy.disks[0].size, stored()) == (5 * M, 5 * M)


def grow(backend: Backend, disk: Disk, size: int) -> None:
    """Resize the innermost layer as another program, without the store."""
    img.resize(disk.path, disk.format, size, backend.host.keys.unwrap_all(disk), shrink=False)
