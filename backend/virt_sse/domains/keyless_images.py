"""Images of disks of ours in domains that have the images without encryption.

QEMU takes the ciphertext of a raw image, or a whole qcow2 file, for the guest's data: the guest overwrites
the LUKS header and the data of the disk, and leaves its own data in plaintext.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import libvirt

from virt_sse.errors import LibvirtUnavailableError, PolicyError
from virt_sse.keys.host import Host
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.pools import volume_path
from virt_sse.model.disks import Disk
from virt_sse.system.files import canonical

VolumePath = Callable[[str, str], Path | None]
"""Finds the path of a volume by the names of pool and volume; ``None`` for an unknown volume."""


def plain_paths(
    definition: DomainDefinition, backup: BackupJob | None = None, *, volume: VolumePath
) -> dict[Path, str]:
    """The files to which a domain may write without encryption; by path, the disk's name in the guest.

    :raise InvalidValueError: When a name has our prefix and is malformed.
    """
    found = {}
    for chain in definition.disk_chains(backup):
        for link in chain.written_as_plain:
            path = volume(*link.volume) if link.volume else link.path
            if path is not None:
                found[path] = chain.target
    return found


def refuse_keyless_images(host: Host, definition: DomainDefinition) -> None:
    """Refuse a domain about to start that has the image of a disk of ours without the disk's key.

    A volume of a storage pool is left to the agent if libvirt does not answer.

    :raise PolicyError: When the domain has such an image.
    :raise StoreError: When the store cannot be queried.
    """

    def volume(pool: str, name: str) -> Path | None:
        if host.image_paths.has_volume(name):
            with (
                contextlib.suppress(LibvirtUnavailableError, libvirt.libvirtError),
                connected(host.config.libvirt_uri) as connection,
            ):
                return volume_path(connection, pool, name)
        return None

    named = plain_paths(definition, volume=volume)
    if not named:
        return
    targets = {canonical(path): target for path, target in named.items()}
    targets |= {Path(os.path.realpath(path)): target for path, target in named.items()}
    for disk in host.store_reads.at_paths(list(targets)):
        raise PolicyError(
            f"{targets[disk.path]} is {disk.path}, {described(disk)}, without its key: "
            "the guest would overwrite the encrypted data",
            hint=f"'virt-sse disk xml {disk.name}' prints the <disk> element with the key",
        )


def described(disk: Disk) -> str:
    """The disk in words, for messages about its image."""
    return f"the image of {disk.kind.title} {disk.name!r}"
