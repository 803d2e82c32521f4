"""The vault's database: migrated by Alembic, also from the versions before Alembic, without loss."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import alembic.autogenerate
import alembic.migration
import alembic.script
import pytest
import sqlalchemy as sa

from support.vault_doubles import Records
from virt_sse.system.database_url import sqlite_url
from virt_sse.system.migrations import alembic_config
from virt_sse.vault.home import database as vault_database
from virt_sse.vault.home.database import SCHEMA
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.tables import metadata
from virt_sse.vault.keys.records import NewKey
from virt_sse.vault.vault import open_vault

pytestmark = pytest.mark.filterwarnings("ignore:.*expression-based index")

BEFORE_ALEMBIC = """
CREATE TABLE keys (name VARCHAR(127) NOT NULL, deleted INTEGER, purge INTEGER, policy TEXT,
    PRIMARY KEY (name));
CREATE TABLE leftovers (name VARCHAR(127) NOT NULL, version VARCHAR(32) NOT NULL,
    key_type VARCHAR(16) NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE principals (client_id VARCHAR(36) NOT NULL, object_id VARCHAR(36) NOT NULL,
    name VARCHAR(128) NOT NULL, public_key TEXT NOT NULL, role VARCHAR(32) NOT NULL, enabled BOOLEAN NOT NULL,
    expires INTEGER, created INTEGER NOT NULL, created_by VARCHAR(36), PRIMARY KEY (client_id),
    UNIQUE (object_id), UNIQUE (name));
CREATE TABLE assertions (digest BLOB NOT NULL, expires INTEGER NOT NULL, PRIMARY KEY (digest));
CREATE INDEX assertions_by_expiry ON assertions (expires);
CREATE TABLE sealed_secrets (name VARCHAR(64) NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (name));
CREATE TABLE versions (sequence INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, name VARCHAR(127) NOT NULL,
    version VARCHAR(32) NOT NULL, key_type VARCHAR(16) NOT NULL, n BLOB NOT NULL, e INTEGER NOT NULL,
    operations TEXT NOT NULL, enabled BOOLEAN NOT NULL, not_before INTEGER, expires INTEGER,
    created INTEGER NOT NULL, updated INTEGER NOT NULL, tags TEXT NOT NULL, stored BLOB NOT NULL,
    UNIQUE (name, version), FOREIGN KEY(name) REFERENCES keys (name) ON DELETE CASCADE);
CREATE TABLE permissions (client_id VARCHAR(36) NOT NULL, permission VARCHAR(32) NOT NULL,
    PRIMARY KEY (client_id, permission),
    FOREIGN KEY(client_id) REFERENCES principals (client_id) ON DELETE CASCADE);
"""
"""As the development versions made a vault's database."""

TABLES = ("keys", "versions", "leftovers", "principals", "permissions", "assertions", "sealed_secrets")


def make_older(directory: VaultDirectory, user_version: int) -> None:
    """Move a vault's rows into a database of a development version."""
    old = directory.path / "old.sqlite"
    with closing(sqlite3.connect(old)) as database:
        database.executescript(BEFORE_ALEMBIC)
        database.execute("ATTACH ? AS new", (str(directory.database_path),))
        for table in TABLES:
            columns = ", ".join(row[1] for row in database.execute(f"PRAGMA main.table_info({table})"))
            database.execute(f"INSERT INTO main.{table} SELECT {columns} FROM new.{table}")  # noqa: S608 -- constants
        database.execute(f"PRAGMA user_version = {user_version}")
        if user_version == 1:
            database.execute("DROP TABLE leftovers")
        database.commit()
    for suffix in ("-wal", "-shm"):
        Path(f"{directory.database_path}{suffix}").unlink(missing_ok=True)
    old.rename(directory.database_path)
    directory.database_path.chmod(0o600)


def differences(path: Path) -> list[object]:
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        with engine.connect() as connection:
            context = alembic.migration.MigrationContext.configure(connection, opts={"compare_type": True})
            return list(alembic.autogenerate.compare_metadata(context, metadata))
    finally:
        engine.dispose()


@pytest.mark.parametrize("user_version", [1, 2])
def test_a_database_from_before_alembic_is_adopted_without_loss(
    directory: VaultDirectory, records: Records, user_version: int
) -> None:
    with open_vault(directory, records) as vault:
        first = vault.keys.create("kek", "RSA", 2048, NewKey(tags={"a": "b"}))
        vault.rotation.set_policy("kek", {"attributes": {"expiryTime": "P90D"}})
        second = vault.rotation.rotate("kek")
        vault.keys.create("gone", "RSA", 2048, NewKey())
        vault.keys.delete("gone")
        policy, principals = vault.rotation.policy("kek"), vault.principals.all()
        sealed = vault.keys.encrypt("wrapKey", "kek", first.version, "RSA-OAEP-256", b"dek")[1]
    make_older(directory, user_version)
    for _ in range(2):
        with open_vault(directory, records) as vault:
            assert vault.keys.versions("kek") == [first, second]
            assert (vault.rotation.policy("kek"), vault.principals.all()) == (policy, principals)
            assert vault.keys.decrypt("unwrapKey", "kek", first.version, "RSA-OAEP-256", sealed)[1] == b"dek"
            assert vault.keys.recover("gone")
            vault.keys.delete("gone")
    with closing(sqlite3.connect(directory.database_path)) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [(SCHEMA,)]
    assert differences(directory.database_path) == []


def test_migrations_make_the_tables(directory: VaultDirectory) -> None:
    assert differences(directory.database_path) == []


def test_the_constant_is_the_newest_migration() -> None:
    config = alembic_config(Path(vault_database.__file__).parent / "migrations")
    assert alembic.script.ScriptDirectory.from_config(config).get_heads() == [SCHEMA]


def test_an_up_to_date_database_is_opened_without_alembic(directory: VaultDirectory) -> None:
    program = (
        "import sys; from virt_sse.vault.home.database import Database\n"
        f"Database({sqlite_url(directory.database_path)!r}).close()\n"
        "sys.exit('alembic' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
