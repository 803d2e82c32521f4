"""A store moves from SQLite to PostgreSQL under a site of disks of every kind, and every disk still opens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import images
from support.agent_site import RIGHTS
from support.command_line import CommandLine
from support.customer_keys import CustomerKeys
from support.postgresql import PostgresqlServer
from virt_sse.backend import Backend
from virt_sse.errors import StoreMovedError
from virt_sse.host.setup import initialise
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, NewDisk
from virt_sse.model.layers import EncryptionType
from virt_sse.vault_client.permissions import Role

AT_ONCE = 4


@pytest.fixture
def url(postgresql: PostgresqlServer) -> Iterator[str]:
    with postgresql.database(template="template0") as name:
        yield postgresql.url(name)


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "credentials") as keys:
        yield keys


def create_sets(backend: Backend, keys: CustomerKeys) -> list[str | None]:
    """Sets with each encryption type and kind of key, and the platform's key without a set."""
    path = backend.host.config.operator_credential
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"host-{path.parent.stat().st_ino}"
    keys.administration.new_credential_file(path, name, role=Role.IDENTITY_OPERATOR)
    names: list[str | None] = [None]
    for encryption_type in (EncryptionType.CUSTOMER_KEY, EncryptionType.PLATFORM_AND_CUSTOMER_KEYS):
        for provider, key in (
            ("customer-managed", keys.new_key()),
            (PLATFORM_KEY.provider, PLATFORM_KEY.name),
        ):
            made = backend.sets.create(
                f"set-{len(names)}", provider=provider, key=key, encryption_type=encryption_type
            )
            names.append(made.name)
            if made.identity:
                keys.administration.set_permissions(made.identity, RIGHTS)
    return names


@pytest.mark.slow
def test_every_disk_opens_after_the_move(
    request: pytest.FixtureRequest, root: Path, virt_sse: CommandLine, keys: CustomerKeys, url: str
) -> None:
    images.require("qemu-img", "qemu-storage-daemon", "cryptsetup")
    count = int(request.config.getoption("--moved-disks"))
    with Backend.open(root) as backend, ThreadPoolExecutor(AT_ONCE) as pool:
        initialise(backend.host)
        kinds = itertools.cycle(itertools.product(create_sets(backend, keys), DiskFormat))
        new = [
            NewDisk(name=f"disk-{number}", size=1 << 20, format=image_format, encryption_set=encryption_set)
            for number, (encryption_set, image_format) in zip(range(count), kinds, strict=False)
        ]
        before = {disk.name: disk for disk in pool.map(backend.disks.create, new)}
    virt_sse("store", "migrate", url)
    with pytest.raises(StoreMovedError):
        Backend.open(root)
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[store]\nurl = '{url}'\n")
    with Backend.open(root) as backend, ThreadPoolExecutor(AT_ONCE) as pool:
        assert {disk.name: disk for disk in backend.host.store.all()} == before
        list(pool.map(backend.disks.check, before))
