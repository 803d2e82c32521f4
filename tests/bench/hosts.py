"""Backends for benchmarks, isolated from the machine's libvirt."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
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
def private_backend(root: Path, *, store_url: str | None = None) -> Iterator[Backend]:
    """A backend under *root*, a new folder, with a keyring and without any libvirt.

    :param store_url: default: an SQLite file under *root*.
    """
    root.mkdir()
    if store_url:
        _use_store(root, store_url)
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
def joined_backend(root: Path, other: Config) -> Iterator[Backend]:
    """A backend under *root*, a new folder, of a host with the store and the keys of *other*."""
    _use_store(root, other.store_url)
    config = dataclasses.replace(Config.load(root), libvirt_uri=f"qemu+unix:///system?socket={root}/none")
    config.state_directory.mkdir(mode=0o700, parents=True)
    shutil.copytree(other.state_directory / "platform-managed", config.state_directory / "platform-managed")
    shutil.copy(other.state_directory / "host.key", config.state_directory)
    with Backend(config) as backend:
        yield backend


def _use_store(root: Path, url: str) -> None:
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[store]\nurl = '{url}'\n")


@contextlib.contextmanager
def prepared_host(*, store_url: str | None = None) -> Iterator[tuple[LabHost, Backend]]:
    """A lab host after ``virt-sse host init``, with virt-sse's hook active in libvirtd, and its backend.

    :param store_url: default: an SQLite file of the host.
    :raise LabUnavailableError: When the machine lacks what a lab host needs.
    """
    with LabHost() as host:
        if store_url:
            _use_store(host.root, store_url)
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
