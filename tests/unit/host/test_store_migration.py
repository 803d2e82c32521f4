"""``store migrate``, ``backup`` and ``restore``, between SQLite and PostgreSQL."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

import virt_sse.host.store_migration
import virt_sse.store.copying
import virt_sse.store.ownership
from support.faults import crash_points, dies_at
from support.postgresql import PostgresqlServer
from support.stores import execute
from virt_sse.agent.listener import listening
from virt_sse.config import Config
from virt_sse.errors import AgentError, InvalidValueError, StoreError, StoreMovedError
from virt_sse.host.backup import back_up_store, restore_store
from virt_sse.host.store_migration import migrate_store
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.envelope import DekEntry
from virt_sse.model.hosts import HostIdentity
from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import EncryptionType, Placement
from virt_sse.model.protected_domains import ProtectedDomain
from virt_sse.model.replacements import Replacement
from virt_sse.model.scale_sets import Instance, ScaleSet
from virt_sse.model.vms import Vm, VmProperties
from virt_sse.store.store import Store
from virt_sse.system.database_url import sqlite_url

MODULES = (virt_sse.host.store_migration, virt_sse.store.copying, virt_sse.store.ownership)
CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def server_url(postgresql: PostgresqlServer) -> Iterator[str]:
    with postgresql.database(template="template0") as name:
        yield postgresql.url(name)


@pytest.fixture(params=["to-postgresql", "to-sqlite"])
def urls(request: pytest.FixtureRequest, root: Path, server_url: str) -> tuple[str, str]:
    """The store's URL, and the URL of the new database."""
    file = sqlite_url(root / "var/lib/virt-sse/store.sqlite")
    return (file, server_url) if request.param == "to-postgresql" else (server_url, file)


@pytest.fixture
def config(root: Path, urls: tuple[str, str]) -> Config:
    config = dataclasses.replace(Config.load(root), store_url=urls[0])
    fill(config.store_url)
    execute(config.store_url, "UPDATE hosts SET seen = 0")
    return config


def fill(url: str, disks: int = 20) -> None:
    """Fill every table."""
    with closing(Store(url)) as store:
        store.encryption_sets.add(
            EncryptionSet(
                id=uuid.UUID(int=1),
                name="web",
                key=KeyRef("customer-managed", "https://vault.example/keys/ключ"),
                key_version=None,
                encryption_type=EncryptionType.CUSTOMER_KEY,
                automatic_rotation=True,
                subscription="ours",
                region="here",
                tenant=None,
                identity="client",
                revocation=RevocationAction.SHUTDOWN,
                grace_seconds=60,
                created=CREATED,
                placement=Placement.STORAGE,
            ),
            limit=None,
        )
        for number in range(disks):
            wrapped = WrappedDek(bytes(range(256)), "A256KW", KeyId("provider", "default", str(number)))
            store.add(
                Disk(
                    id=uuid.uuid5(uuid.NAMESPACE_OID, str(number)),
                    name=f"disk-{number:04}",
                    path=Path("/images", str(number)),
                    format=DiskFormat.QCOW2,
                    size=64 << 40,
                    state=DiskState.READY,
                    encryption_type=EncryptionType.CUSTOMER_KEY,
                    created=CREATED,
                    generation=number,
                    set_id=uuid.UUID(int=1) if number % 2 else None,
                    deks=tuple(DekEntry(slot, AES_256_XTS, wrapped) for slot in ("service", "host")),
                )
            )
        store.vms.put(Vm(uuid.UUID(int=3), "vm", uuid.UUID(int=4), VmProperties(True, "size", 1 << 40)))
        store.certificates.request(uuid.UUID(int=5), "gone", b"{}")
        store.replacements.begin(
            Replacement(disk_id=uuid.UUID(int=6), name="new", source_path=Path("/plain"), target="vda")
        )
        store.scale_sets.add(
            ScaleSet(uuid.UUID(int=7), "set", "<domain/>", uuid.UUID(int=8), 2, False, CREATED)
        )
        host = HostIdentity(uuid.UUID(int=11), "host", uuid.UUID(int=12))
        other = HostIdentity(uuid.UUID(int=13), "other", uuid.UUID(int=14))
        store.hosts.enter(host)
        store.hosts.enter(other)
        store.hosts.start(host, uuid.UUID(int=3), [], [])
        store.hosts.await_handover(other, uuid.UUID(int=3), [], [])
        protected = ProtectedDomain(uuid.UUID(int=13), "kept", host.id, "<domain/>", True, bytes(32))
        store.protected_domains.protect(protected)
        instance = Instance(1, uuid.UUID(int=9), uuid.UUID(int=10), False)
        store.scale_sets.plan(uuid.UUID(int=7), [instance])


def everything(url: str) -> list[object]:
    """What a store answers."""
    with closing(Store(url)) as store:
        return [
            store.all(),
            store.encryption_sets.all(),
            store.vms.all(),
            store.replacements.all(),
            store.scale_sets.all(),
            store.certificates.requested(uuid.UUID(int=5)),
            [(each.name, each.leases) for each in store.hosts.all()],
            store.protected_domains.all(),
        ]


def test_a_store_moves_with_every_row(config: Config, urls: tuple[str, str]) -> None:
    before = everything(urls[0])
    with closing(Store(urls[0])) as opened_before:
        moved = migrate_store(config, urls[1])
        assert everything(urls[1]) == before
        assert moved["disks"].rows == 20
        assert moved["wrapped_deks"].rows == 40
        assert all(each.rows for name, each in moved.items())
        for action in (opened_before.all, lambda: opened_before.remove(uuid.UUID(int=1))):
            with pytest.raises(StoreMovedError, match="the store has moved to the "):
                action()
    with pytest.raises(StoreMovedError, match="the store has moved to the ") as caught:
        Store(urls[0])
    assert caught.value.hint
    with closing(Store(urls[1])) as store:
        store.remove(store.get("disk-0000").id)
    assert migrate_store(config, urls[1]) == moved  # the new store is in use: nothing is done
    assert len(everything(urls[1])[0]) == 19  # type: ignore[arg-type]


def test_other_databases_are_refused(config: Config, urls: tuple[str, str], tmp_path: Path) -> None:
    fill(urls[1], disks=1)
    before = everything(urls[0])
    with pytest.raises(StoreError, match="has rows of another store"):
        migrate_store(config, urls[1])
    with pytest.raises(InvalidValueError, match="already"):
        migrate_store(config, urls[0])
    with pytest.raises(InvalidValueError, match="password on the command line"):
        migrate_store(config, "postgresql://virt_sse:secret@/other?host=/nowhere")
    with pytest.raises(StoreError, match="cannot open the store"):
        migrate_store(config, "postgresql://virt_sse@/other?host=/nowhere")
    with listening(config.agent_socket), pytest.raises(AgentError, match="is running"):
        migrate_store(config, sqlite_url(tmp_path / "new.sqlite"))
    assert everything(urls[0]) == before
    migrate_store(config, sqlite_url(tmp_path / "new.sqlite"))
    with pytest.raises(StoreError, match=r"has moved to the SQLite file .*, not to the "):
        migrate_store(config, sqlite_url(tmp_path / "third.sqlite"))


def test_a_store_is_not_moved_under_another_hosts_agent(root: Path, server_url: str, tmp_path: Path) -> None:
    fill(server_url)
    config = dataclasses.replace(Config.load(root), store_url=server_url)
    with pytest.raises(AgentError, match="host 'host' was seen"):
        migrate_store(config, sqlite_url(tmp_path / "new.sqlite"))


def test_unfinished_work_of_a_single_host_is_finished_first(root: Path, server_url: str) -> None:
    config = Config.load(root)
    fill(config.store_url)
    with closing(Store(config.store_url)) as store:
        store.set_state(disk_id := store.get("disk-0007").id, DiskState.DELETING)
        with pytest.raises(StoreError, match="work on disk 'disk-0007' is not finished"):
            migrate_store(config, server_url)
        store.set_state(disk_id, DiskState.READY)
        migrate_store(config, server_url)


def test_a_changed_copy_is_no_store(
    config: Config, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(virt_sse.host.store_migration, "settle_copy", killed)
        with pytest.raises(KeyboardInterrupt):
            migrate_store(config, urls[1])
    with pytest.raises(StoreError, match="unfinished copy"):
        Store(urls[1])
    execute(urls[1], "UPDATE disks SET size = 1 WHERE name = 'disk-0001'")
    with pytest.raises(StoreError, match="table disks has 20 rows"):
        migrate_store(config, urls[1])


@pytest.mark.slow
def test_a_killed_move_leaves_the_old_store_or_is_finished(
    root: Path, postgresql: PostgresqlServer, tmp_path: Path
) -> None:
    file = root / "var/lib/virt-sse/store.sqlite"
    config = Config.load(root)
    fill(config.store_url, disks=2)
    before = everything(config.store_url)
    original = file.read_bytes()
    with postgresql.database(template="template0") as name:
        points = crash_points(MODULES, lambda: migrate_store(config, postgresql.url(name)))
    assert len(points) > 30
    outcomes = set()
    for point in [*points[:: len(points) // 5], *points[-8::3]]:
        for each in file.parent.glob("store.sqlite*"):
            each.unlink()
        file.write_bytes(original)
        with postgresql.database(template="template0") as name:
            url = postgresql.url(name)
            assert dies_at(point, MODULES, lambda: migrate_store(config, url))  # noqa: B023
            try:
                assert everything(config.store_url) == before
                outcomes.add("old")
            except StoreMovedError:
                outcomes.add("moved")
            migrate_store(config, url)
            assert everything(url) == before
    assert outcomes == {"old", "moved"}


def test_a_writer_waits_and_is_told(
    config: Config, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No change is lost between the copy and the mark."""
    copy_rows = virt_sse.store.copying.copy_rows
    with closing(Store(urls[0])) as store, ThreadPoolExecutor(1) as pool:
        writers = []

        def slow(*connections: object) -> object:
            writers.append(pool.submit(store.set_size, store.get("disk-0001").id, 512))
            time.sleep(0.2)
            assert not writers[0].done()
            return copy_rows(*connections)  # type: ignore[arg-type]

        monkeypatch.setattr(virt_sse.store.copying, "copy_rows", slow)
        migrate_store(config, urls[1])
        with pytest.raises(StoreMovedError):
            writers[0].result(30)


def test_a_backup_is_restored_into_either_database(
    config: Config, urls: tuple[str, str], tmp_path: Path, postgresql: PostgresqlServer
) -> None:
    file = tmp_path / "backup"
    before = everything(urls[0])
    back_up_store(config, file)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="File exists"):
        back_up_store(config, file)
    with pytest.raises(StoreError, match="the host has a store"):
        restore_store(config, file)
    with postgresql.database(template="template0") as name:
        for url in (sqlite_url(tmp_path / "other/store.sqlite"), postgresql.url(name)):
            other = dataclasses.replace(config, store_url=url)
            restore_store(other, file)
            assert everything(url) == before
            with pytest.raises(StoreError, match="the host has a store"):
                restore_store(other, file)
    assert [path.name for path in config.state_directory.glob(".*")] == []
