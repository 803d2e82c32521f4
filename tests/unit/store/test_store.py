from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import alembic.autogenerate
import alembic.migration
import alembic.script
import pytest
import sqlalchemy as sa

import virt_sse.store.store
from support.folders import TESTS
from support.stores import connected, execute
from virt_sse.errors import DiskExistsError, DiskNotFoundError, DiskStateError, StoreError
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, DiskState
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import EncryptionType
from virt_sse.store.schema import SCHEMA
from virt_sse.store.store import Store
from virt_sse.store.tables import metadata
from virt_sse.system.migrations import alembic_config


def entry(version: str = "1", slot: str = "service") -> DekEntry:
    wrapped = WrappedDek(b"wrapped " + version.encode(), "A256KW", KeyId("provider", "default", version))
    return DekEntry(slot, AES_256_XTS, wrapped)


def disk(name: str, *deks: DekEntry, state: DiskState = DiskState.READY) -> Disk:
    return Disk(
        id=uuid.uuid5(uuid.NAMESPACE_OID, name),
        name=name,
        path=Path("/images", name),
        format=DiskFormat.QCOW2,
        size=64 << 40,
        state=state,
        encryption_type=EncryptionType.PLATFORM_KEY,
        created=datetime(2026, 1, 31, 12, tzinfo=UTC),
        generation=1,
        deks=deks or (entry(),),
    )


def test_a_name_taken_between_check_and_insertion_is_named(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's transactions run side by side; the unique constraints decide."""
    checks: list[str] = []
    refuse = virt_sse.store.store._refuse_taken

    def late(connection: sa.Connection, each: Disk) -> None:
        checks.append(each.name)
        if len(checks) > 1:
            refuse(connection, each)

    with closing(Store(store_url)) as store:
        store.add(disk("first"))
        monkeypatch.setattr(virt_sse.store.store, "_refuse_taken", late)
        with pytest.raises(DiskExistsError, match="a disk with name 'first' exists already"):
            store.add(dataclasses.replace(disk("second"), name="first"))
        assert [each.id for each in store.all()] == [disk("first").id]


def rewrapped(before: Disk, *deks: DekEntry) -> Disk:
    return dataclasses.replace(before, deks=deks, generation=before.generation + 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/store.sqlite"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


@pytest.fixture
def file_store(path: Path) -> Iterator[Store]:
    """A store in SQLite."""
    store = Store(f"sqlite:///{path}")
    yield store
    store.close()


def in_processes(count: int, url: str, body: str) -> list[str]:
    """What so many processes print that run *body*, with ``store`` and ``number``, at the same time."""
    script = (
        "import sys, time; sys.path[:0] = sys.argv[3].split(':'); number = int(sys.argv[1])\n"
        "from test_store import *\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"store = Store(sys.argv[2])\n{body}\nstore.close()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(number), url, f"{Path(__file__).parent}:{TESTS}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        answers.append(process.communicate()[0])
        assert process.returncode == 0, answers[-1]
    return answers


def test_an_added_disk_is_found(store: Store) -> None:
    one, two = disk("one"), disk("two", entry("1", "service"), entry("9", "host"))
    for added in (two, one):
        store.add(added)
    assert store.all() == [one, two]
    assert store.get("two") == store.get(str(two.id)) == store.get(two.id.hex) == two
    assert store.find_by_path(one.path) == one
    assert store.find_by_path(Path("/images")) is None
    assert store.unfinished() == []
    for unknown in ("three", "", "\udcff", "x" * 10_000, str(uuid.uuid4()), "one\0", "%"):
        with pytest.raises(DiskNotFoundError):
            store.get(unknown)


def test_name_path_and_id_are_taken_once(store: Store) -> None:
    store.add(one := disk("one"))
    other = disk("other")
    for taken in ("name", "path", "id"):
        with pytest.raises(DiskExistsError, match=taken):
            store.add(dataclasses.replace(other, **{taken: getattr(one, taken)}))
    store.add(other)
    with pytest.raises(DiskExistsError):
        store.set_path(other.id, one.path)
    assert store.all() == [one, other]


def test_a_deleted_disk_is_finished_and_its_name_taken(store: Store) -> None:
    moments = [datetime(2026, 1, day, 12, tzinfo=UTC) for day in (1, 8)]
    store.add(one := disk("one"))
    with pytest.raises(DiskStateError, match="is not deleted any more"):
        store.set_recovered(one.id)
    store.set_deleted(one.id, *moments)
    deleted = store.get("one")
    assert (deleted.state, [deleted.deleted, deleted.scheduled_purge]) == (DiskState.DELETED, moments)
    assert store.unfinished() == []
    with pytest.raises(DiskStateError, match="is not ready any more"):
        store.set_deleted(one.id, *moments)
    with pytest.raises(DiskExistsError) as caught:
        store.add(dataclasses.replace(disk("two"), name="one"))
    assert "virt-sse disk purge" in str(caught.value.hint)
    store.set_recovered(one.id)
    assert store.all() == [one]


def test_changes_of_a_disk_are_stored(store: Store) -> None:
    store.add(one := disk("one", state=DiskState.CREATING))
    assert store.unfinished() == [one]
    store.set_state(one.id, DiskState.READY)
    store.set_size(one.id, 512)
    store.set_path(one.id, Path("/elsewhere"))
    changed = store.get("one")
    assert (changed.state, changed.size, changed.path) == (DiskState.READY, 512, Path("/elsewhere"))
    store.drop_deks(one.id)
    assert store.get("one").deks == ()
    store.remove(one.id)
    store.remove(one.id)
    assert store.all() == []
    with pytest.raises(DiskNotFoundError):
        store.set_size(one.id, 512)


def test_deks_are_swapped_only_for_the_generation_that_was_seen(store: Store) -> None:
    store.add(one := disk("one"))
    assert store.replace(one, rewrapped(one, entry("2")))
    assert not store.replace(one, rewrapped(one, entry("3")))
    after = store.get("one")
    assert (after.generation, after.deks) == (2, (entry("2"),))
    store.remove(one.id)
    assert not store.replace(after, rewrapped(after, entry("3")))


def test_disks_are_found_by_their_key(store: Store) -> None:
    store.add(disk("one", entry("1")))
    store.add(disk("two", entry("2"), entry("2", "host")))
    assert [found.name for found in store.under_key(KeyRef("provider", "default"))] == ["one", "two"]
    assert store.under_key(KeyRef("provider", "other")) == store.under_key(KeyRef("other", "default")) == []
    assert store.keys_in_use() == {
        (KeyId("provider", "default", "1"), None): 1,
        (KeyId("provider", "default", "2"), None): 2,
    }


def test_deleted_rows_leave_no_bytes_in_the_file(file_store: Store, path: Path) -> None:
    file_store.add(one := disk("one", entry("a-version-to-be-forgotten")))
    file_store.remove(one.id)
    file_store.close()
    assert b"a-version-to-be-forgotten" not in path.read_bytes()


def test_the_files_are_ours_alone(file_store: Store, path: Path) -> None:
    file_store.add(disk("one"))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(list(path.parent.iterdir())) == 4  # store, lock, -wal, -shm
    for file in path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file


def test_a_reader_does_not_wait_for_a_writer(store: Store, store_url: str) -> None:
    store.add(one := disk("one"))
    with connected(store_url) as other:
        other.execute(sa.text("DELETE FROM disks"))
        start = time.monotonic()
        assert store.all() == [one]
        assert time.monotonic() - start < 5
        other.rollback()


@pytest.mark.slow
def test_processes_migrate_once_at_first_use(empty_url: str) -> None:
    in_processes(4, empty_url, "store.add(disk(f'disk-{number}'))")
    store = Store(empty_url)
    assert [found.name for found in store.all()] == [f"disk-{number}" for number in range(4)]
    store.close()


@pytest.mark.slow
def test_eight_processes_write_at_the_same_time(store: Store, store_url: str) -> None:
    store.add(disk("shared"))
    body = (
        "won = 0\n"
        "for step in range(4):\n"
        "    store.add(disk(f'disk-{number}-{step}'))\n"
        "    store.set_size(disk(f'disk-{number}-{step}').id, 512)\n"
        "    shared = store.get('shared')\n"
        "    won += store.replace(shared, rewrapped(shared, entry(f'{number}-{step}')))\n"
        "print(won)"
    )
    won = sum(int(answer) for answer in in_processes(8, store_url, body))
    assert store.get("shared").generation == 1 + won
    assert won >= 4
    assert [found.size for found in store.all()] == [512] * 32 + [64 << 40]


DEVELOPMENT_STORE = """
CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));
CREATE TABLE disks (id CHAR(32) NOT NULL, name VARCHAR(80) NOT NULL, path TEXT NOT NULL,
    format VARCHAR(16) NOT NULL, size BIGINT NOT NULL, state VARCHAR(16) NOT NULL,
    encryption_type VARCHAR(64) NOT NULL, created VARCHAR(40) NOT NULL, generation INTEGER NOT NULL,
    sku VARCHAR(32) DEFAULT 'Premium_LRS' NOT NULL,
    encryption_set_id CHAR(32) REFERENCES encryption_sets (id), caching VARCHAR(16) DEFAULT 'None' NOT NULL,
    PRIMARY KEY (id), UNIQUE (name), UNIQUE (path));
CREATE TABLE wrapped_deks (disk_id CHAR(32) NOT NULL, position INTEGER NOT NULL, slot VARCHAR(32) NOT NULL,
    cipher VARCHAR(64) NOT NULL, algorithm VARCHAR(32) NOT NULL, ciphertext BLOB NOT NULL,
    key_provider VARCHAR(64) NOT NULL, key_name TEXT NOT NULL, key_version VARCHAR(64) NOT NULL,
    PRIMARY KEY (disk_id, position), FOREIGN KEY(disk_id) REFERENCES disks (id) ON DELETE CASCADE);
CREATE INDEX wrapped_deks_by_key ON wrapped_deks (key_provider, key_name, key_version);
CREATE TABLE encryption_sets (id CHAR(32) NOT NULL, name VARCHAR(80) NOT NULL,
    key_provider VARCHAR(64) NOT NULL, key_name TEXT NOT NULL, key_version VARCHAR(64),
    encryption_type VARCHAR(64) NOT NULL, automatic_rotation BOOLEAN NOT NULL,
    subscription VARCHAR(64) NOT NULL, region VARCHAR(64) NOT NULL, tenant VARCHAR(64), identity VARCHAR(64),
    revocation VARCHAR(16) NOT NULL, grace_seconds INTEGER NOT NULL, created VARCHAR(40) NOT NULL,
    PRIMARY KEY (id), UNIQUE (name));
CREATE TABLE vms (id CHAR(32) NOT NULL, name TEXT NOT NULL, host CHAR(32) NOT NULL,
    encryption_at_host BOOLEAN NOT NULL, size VARCHAR(64), temp_disk_size BIGINT, generation INTEGER NOT NULL,
    pending TEXT, tpm_algorithm VARCHAR(32), tpm_ciphertext BLOB, tpm_key_provider VARCHAR(64),
    tpm_key_name TEXT, tpm_key_version VARCHAR(64), PRIMARY KEY (id));
INSERT INTO disks VALUES ('00000000000000000000000000000000', 'old', '/images/old', 'qcow2', 512, 'ready',
    'EncryptionAtRestWithPlatformKey', '2026-01-31T12:00:00+00:00', 3, 'Premium_LRS', NULL, 'None');
INSERT INTO wrapped_deks VALUES ('00000000000000000000000000000000', 0, 'service', 'aes-256-xts', 'A256KW',
    x'00ff', 'provider', 'default', '1');
INSERT INTO alembic_version VALUES ('0003');
"""
"""As the three migrations of the development versions made a store."""


def test_an_older_store_is_opened_with_every_wrapped_dek(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(DEVELOPMENT_STORE)
    store = Store(f"sqlite:///{path}")
    old = store.get("old")
    assert old.deks[0].wrapped == WrappedDek(b"\0\xff", "A256KW", KeyId("provider", "default", "1"))
    assert (old.generation, old.sku, old.set_id) == (3, DiskSku.PREMIUM_SSD, None)
    store.add(disk("new"))
    store.close()
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = alembic.migration.MigrationContext.configure(connection, opts={"compare_type": True})
        assert alembic.autogenerate.compare_metadata(context, metadata) == []
    engine.dispose()


@pytest.mark.parametrize("schema", ["0001", "0002"])
def test_a_store_of_an_unfinished_schema_is_refused_and_kept(path: Path, schema: str) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(DEVELOPMENT_STORE)
        database.execute("UPDATE alembic_version SET version_num = ?", (schema,))
        database.commit()
    with pytest.raises(StoreError, match=f"schema {schema}, of a development version") as caught:
        Store(f"sqlite:///{path}")
    assert caught.value.hint
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT ciphertext FROM wrapped_deks").fetchall() == [(b"\0\xff",)]


def test_a_newer_schema_is_refused(store: Store, store_url: str) -> None:
    store.close()
    execute(store_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="schema 9999") as caught:
        Store(store_url)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"text that is no database at all, but long" * 100, b"\0" * 5000])
def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match="cannot open the store"):
        Store(f"sqlite:///{path}")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///relative",
        "sqlite://",
        "nonsense",
        "nosuch://host/db",
        "mysql://host/db",
        "postgresql+psycopg2://host/db",
        "postgresql://user:pass/word@host/db",
        "",
    ],
)
def test_a_database_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(url)
    assert "word" not in str(caught.value)


def test_a_store_that_fails_later_says_so_without_the_statement(store: Store, store_url: str) -> None:
    execute(store_url, "DROP TABLE wrapped_deks")
    with pytest.raises(StoreError, match=r"no such table|does not exist") as caught:
        store.add(disk("one"))
    assert "INSERT" not in str(caught.value)
    assert b"wrapped 1" not in repr(caught.value).encode()


@pytest.mark.usefixtures("store")
def test_migrations_make_the_tables(store_url: str) -> None:
    with connected(store_url) as connection:
        context = alembic.migration.MigrationContext.configure(connection, opts={"compare_type": True})
        assert alembic.autogenerate.compare_metadata(context, metadata) == []


def test_the_newest_migration_is_the_one_in_the_code() -> None:
    config = alembic_config(Path(virt_sse.store.__file__).parent / "migrations")
    assert alembic.script.ScriptDirectory.from_config(config).get_heads() == [SCHEMA]
