"""The reader without SQLAlchemy answers as the store does."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from test_store import disk, entry

from virt_sse.errors import DiskNotFoundError, StoreError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import DiskState
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties
from virt_sse.store import LazyStore
from virt_sse.store.reader import StoreReader, StoreReads
from virt_sse.store.store import Store

ONE = disk("one", entry("1", "service"), entry("2", "infrastructure"))
HALF = disk("half", state=DiskState.CREATING)
DELETED = disk("deleted")
MOMENT = datetime(2026, 1, 31, 12, 30, 15, tzinfo=UTC)
NAMED_LIKE_ONE = disk(str(ONE.id))
VM = Vm(
    id=uuid.uuid4(),
    name="web",
    host=uuid.uuid4(),
    properties=VmProperties(True, "Standard_D2s_v3", None),
    generation=3,
    pending=PendingUpdate(VmProperties(False, None, 1 << 30), {ONE.id: HostCaching.READ_WRITE}),
    tpm=WrappedDek(b"\0wrapped", "A256KW", KeyId("provider", "default", "1")),
)
PLAIN_VM = Vm(uuid.uuid4(), "db", uuid.uuid4(), VmProperties(False, None, None), 1, None, None)


@pytest.fixture(params=["state", "a folder: 100%, #1"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param / "store.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{path}")
    yield store
    store.close()


def reader_of(path: Path) -> StoreReader:
    reader = StoreReader.of(f"sqlite:///{path}")
    assert reader is not None
    return reader


@pytest.mark.parametrize(
    "query",
    [
        lambda reads: reads.all(),
        lambda reads: reads.all(DiskKind.DISK),
        lambda reads: reads.all(DiskKind.IMAGE),
        lambda reads: reads.names(),
        lambda reads: reads.names(DiskKind.DISK),
        lambda reads: reads.names(DiskKind.IMAGE),
        lambda reads: reads.unfinished(),
        lambda reads: reads.get("one"),
        lambda reads: reads.get(str(HALF.id)),
        lambda reads: reads.get(str(ONE.id)),
        lambda reads: reads.with_ids([]),
        lambda reads: reads.with_ids([ONE.id, uuid.uuid4(), HALF.id]),
        lambda reads: reads.vms.find(VM.id),
        lambda reads: reads.vms.find(PLAIN_VM.id),
        lambda reads: reads.vms.find(uuid.uuid4()),
    ],
)
def test_the_answers_are_those_of_the_store(
    path: Path, store: Store, query: Callable[[StoreReads], object]
) -> None:
    for each in (ONE, HALF, NAMED_LIKE_ONE, DELETED):
        store.add(each)
    store.set_deleted(DELETED.id, MOMENT, MOMENT)
    for vm in (VM, PLAIN_VM):
        store.vms.put(vm)
    assert query(reader_of(path)) == query(store)


@pytest.mark.parametrize("name", ["two", str(uuid.UUID(int=7)), "", "one\udcff"])
def test_an_unknown_disk_is_the_same_error(path: Path, store: Store, name: str) -> None:
    store.add(ONE)
    messages = []
    for reads in (store, reader_of(path)):
        with pytest.raises(DiskNotFoundError) as raised:
            reads.get(name)
        messages.append((str(raised.value), raised.value.hint))
    assert messages[0] == messages[1]


def test_a_writer_does_not_hold_up_the_reader(path: Path, store: Store) -> None:
    store.add(ONE)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE disks SET size = 1")
    assert reader_of(path).all() == [ONE]
    writer.close()


def test_nothing_is_left_behind_and_nothing_can_be_written(path: Path, store: Store) -> None:
    store.close()
    before = sorted(path.parent.iterdir())
    reader = reader_of(path)
    assert reader.all() == []
    assert sorted(path.parent.iterdir()) == before
    with pytest.raises(StoreError, match="readonly"):
        reader._select("DELETE FROM disks")


def test_a_store_that_must_be_made_or_migrated_is_left_to_the_full_store(path: Path) -> None:
    url = f"sqlite:///{path}"
    assert StoreReader.of(url) is None
    assert not path.exists()
    lazy = LazyStore(url)
    assert lazy.reads() is lazy.full()
    lazy.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    assert StoreReader.of(url) is None
    with pytest.raises(StoreError, match="unknown to this virt-sse"):
        LazyStore(url).reads()


def test_a_store_in_postgresql_is_left_to_the_full_store() -> None:
    assert StoreReader.of("postgresql://db/virt-sse") is None


def test_a_damaged_database_is_reported(path: Path, store: Store) -> None:
    reader = reader_of(path)
    store.close()
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(StoreError, match="the store failed: "):
        reader.all()
    with pytest.raises(StoreError, match="cannot open the store"):
        LazyStore(f"sqlite:///{path}").reads()
