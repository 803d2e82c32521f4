"""Backends for benchmarks, isolated from the machine's libvirt."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.host.setup import initialise
from virt_sse.lab.host import LabHost
from virt_sse.model.disks import PLATFORM_KEY, Disk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import EncryptionType


@contextlib.contextmanager
def private_backend(root: Path) -> Iterator[Backend]:
    """A backend under *root*, a new folder, with a keyring and without any libvirt."""
    root.mkdir()
    config = dataclasses.replace(
        Config.load(root),
        libvirt_uri=f"qemu+unix:///system?socket={root}/none",
        disk_directory=root / "disks",
    )
    config.disk_directory.mkdir()
    with Backend(config) as backend:
        initialise(backend.host)
        yield backend


def double_set(backend: Backend) -> str:
    """A new set for double encryption, both layers under the platform's key; its name."""
    made = backend.sets.create(
        "double",
        provider=PLATFORM_KEY.provider,
        key=PLATFORM_KEY.name,
        encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
    )
    return made.name


@contextlib.contextmanager
def prepared_host() -> Iterator[tuple[LabHost, Backend]]:
    """A lab host after ``virt-sse host init``, with virt-sse's hook active in libvirtd, and its backend.

    :raise LabUnavailableError: When the machine lacks what a lab host needs.
    """
    with LabHost() as host:
        config = dataclasses.replace(Config.load(host.root), libvirt_uri=host.uri, disk_directory=host.images)
        with Backend(config) as backend:
            initialise(backend.host)
            host.restart_libvirtd()
            yield host, backend


def dek_of(backend: Backend, disk: Disk, slot: str = "service") -> Dek:
    """The DEK in a slot of the disk; on a disk with a single layer, this DEK opens the image."""
    entry = disk.dek(slot)
    provider = backend.host.plugins.key_provider(entry.wrapped.key.provider, disk.identity_for(slot))
    return provider.unwrap(entry.wrapped, context=disk.context(entry.slot))
