"""Backups of a vault's database and of a host's store, made in use and restored."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import pytest

import virt_sse.host.backup
from support.command_line import PROGRAM, CommandLine, no_libvirt
from support.faults import crash_points, dies_at
from support.vault_tools import OAEP, Raw, new_name
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.errors import StoreError
from virt_sse.host.backup import back_up_store, restore_store
from virt_sse.lab.vaults import LabVault
from virt_sse.system import files, sqlite_backup
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE

DEK = "A" * 43


def move_away(database: Path, folder: Path) -> None:
    for path in database.parent.glob(f"{database.name}*"):
        shutil.move(path, folder)


def assert_single_private_file(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.glob(f"*{path.name}*")] == [path.name]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.slow
def test_a_backup_of_a_served_vault_has_the_newest_keys_and_is_restored(
    virt_sse: CommandLine, tmp_path: Path
) -> None:
    file, old = tmp_path / "out" / "vault backup.sqlite", tmp_path / "old"
    file.parent.mkdir()
    old.mkdir()
    with LabVault() as vault:
        with VaultClient(vault.administrator_path) as client:
            client.grant("administrator", USE)
        with Raw(vault, VaultCredential(vault.administrator_path).token()) as raw:
            path = f"/keys/{new_name()}"
            raw("POST", f"{path}/create", {"kty": "RSA"})
            wrapped = raw("POST", f"{path}//wrapkey", {"alg": OAEP, "value": DEK}).body["value"]
        folder = ("--directory", vault.directory)
        database = vault.directory / "vault.sqlite"
        plain = tmp_path / "plain-copy.sqlite"
        shutil.copy(database, plain)  # in WAL mode, the key is not in this file yet
        with closing(sqlite3.connect(f"file:{plain}?immutable=1", uri=True)) as connection:
            assert "keys" not in str(connection.execute("SELECT name FROM sqlite_master").fetchall()) or (
                connection.execute("SELECT name FROM keys").fetchall() == []
            )
        virt_sse("vault", "backup", file, *folder)
        assert_single_private_file(file)
        assert "File exists" in virt_sse.refuses("vault", "backup", file, *folder)
        assert "another process" in virt_sse.refuses("vault", "restore", file, *folder)
        vault.stop()
        assert "has a database" in virt_sse.refuses("vault", "restore", file, *folder)
        move_away(database, old)
        garbage = tmp_path / "garbage"
        garbage.write_bytes(b"no database" * 1000)
        empty = tmp_path / "empty.sqlite"
        empty.touch()
        for wrong in (garbage, empty, tmp_path / "missing"):
            virt_sse.refuses("vault", "restore", wrong, *folder)
        with LabVault() as other:
            theirs = tmp_path / "theirs.sqlite"
            virt_sse("vault", "backup", theirs, "--directory", other.directory)
        assert "root key" in virt_sse.refuses("vault", "restore", theirs, *folder)
        assert list(vault.directory.glob("*vault.sqlite*")) == []
        virt_sse("vault", "restore", file, *folder)
        assert stat.S_IMODE(database.stat().st_mode) == 0o600
        vault.start()
        with Raw(vault, VaultCredential(vault.administrator_path).token()) as raw:
            answer = raw("POST", f"{path}//unwrapkey", {"alg": OAEP, "value": wrapped})
            assert answer.body["value"] == DEK


@pytest.mark.slow
def test_a_backup_of_the_store_in_use_is_restored(root: Path, virt_sse: CommandLine, tmp_path: Path) -> None:
    folder, file, old = tmp_path / "images", tmp_path / "store-backup", tmp_path / "old"
    folder.mkdir()
    old.mkdir()
    virt_sse("host", "init")
    virt_sse("disk", "create", "one", "--size", "1M", "--path", folder / "one.qcow2")
    program = [PROGRAM, "agent", "run"]
    environment = os.environ | {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)}
    database = root / "var/lib/virt-sse/store.sqlite"
    with Popen(program, env=environment, stdout=DEVNULL, stderr=DEVNULL) as agent:
        try:
            wait_until((root / "run/virt-sse/agent.sock").exists, "the agent listens")
            virt_sse("store", "backup", file)
            assert "File exists" in virt_sse.refuses("store", "backup", file)
            assert "agent of this host is running" in virt_sse.refuses("store", "restore", file)
        finally:
            agent.terminate()
            agent.wait(30)
    assert_single_private_file(file)
    assert "has a store" in virt_sse.refuses("store", "restore", file)
    move_away(database, old)
    (tmp_path / "garbage").write_bytes(b"no database" * 1000)
    assert "cannot restore" in virt_sse.refuses("store", "restore", tmp_path / "garbage")
    (tmp_path / "empty").touch()
    assert "not a backup of a store" in virt_sse.refuses("store", "restore", tmp_path / "empty")
    virt_sse("store", "restore", file)
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert "one" in virt_sse("disk", "list")
    virt_sse("disk", "check", "one")


def test_a_backup_is_complete_while_a_writer_is_at_work(tmp_path: Path) -> None:
    from virt_sse.system.sqlite_backup import copy_database

    program = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA journal_mode=WAL')\n"
        "c.execute('CREATE TABLE a (n)'); c.execute('CREATE TABLE b (n)')\n"
        "print(flush=True)\n"
        "for n in range(10**6):\n"
        "    c.execute('BEGIN'); c.execute('INSERT INTO a VALUES (?)', (n,))\n"
        "    c.execute('INSERT INTO b VALUES (?)', (n,)); c.execute('COMMIT')\n"
    )
    database = tmp_path / "database"
    with Popen([sys.executable, "-c", program, str(database)], stdout=PIPE) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            for number in range(5):
                copy = tmp_path / f"copy-{number}"
                copy_database(database, copy)
                with closing(sqlite3.connect(copy)) as connection:
                    of_a = connection.execute("SELECT count(*) FROM a").fetchone()
                    assert of_a == connection.execute("SELECT count(*) FROM b").fetchone()
        finally:
            writer.kill()


@pytest.mark.slow
def test_a_backup_of_a_key_with_many_versions_is_restored() -> None:
    """1,264 versions fitted into the request of a restore once."""
    with LabVault() as vault:
        token = VaultCredential(vault.administrator_path).token()
        with Raw(vault, token) as raw:
            assert raw("POST", "/keys/many/create", {"kty": "RSA"}).status == 200
        vault.stop()
        columns = "name, key_type, n, e, operations, enabled, created, updated, tags, stored"
        with closing(sqlite3.connect(vault.directory / "vault.sqlite")) as connection, connection:
            connection.executemany(
                f"INSERT INTO versions (version, {columns}) SELECT ?, {columns} FROM versions LIMIT 1",  # noqa: S608
                [(f"{number:032x}",) for number in range(2000)],
            )
        vault.start()
        with Raw(vault, token) as raw:
            blob = raw("POST", "/keys/many/backup").body["value"]
            assert raw("DELETE", "/keys/many").status == 200
            assert raw("DELETE", "/deletedkeys/many").status == 204
            assert raw("POST", "/keys/restore", {"value": blob}).status == 200
        with closing(sqlite3.connect(vault.directory / "vault.sqlite")) as connection:
            assert connection.execute("SELECT count(*) FROM versions").fetchone() == (2001,)


@pytest.mark.slow
def test_a_killed_backup_is_whole_or_absent_and_leaves_no_other_file(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    with Backend.open(root) as backend:
        config = backend.host.config

    def back_up() -> None:
        (folder / "store").unlink(missing_ok=True)
        back_up_store(config, folder / "store")

    modules = (virt_sse.host.backup, sqlite_backup, files)
    points = crash_points(modules, back_up)
    for point in points[:: len(points) // 20]:
        assert dies_at(point, modules, back_up)
        assert [path.name for path in folder.iterdir()] in ([], ["store"])
        if (folder / "store").exists():
            assert_single_private_file(folder / "store")
            (folder / "store").unlink()


@pytest.mark.slow
def test_a_killed_restore_is_repeated_and_leaves_no_other_file(root: Path, tmp_path: Path) -> None:
    with Backend.open(root) as backend:
        config = backend.host.config
    back_up_store(config, tmp_path / "backup")
    store = root / "var/lib/virt-sse/store.sqlite"

    def restore() -> None:
        move_away(store, tmp_path / "old")
        restore_store(config, tmp_path / "backup")

    (tmp_path / "old").mkdir()
    restore()  # makes the folder of the agent's lock, which later calls find
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "old").mkdir()
    modules = (virt_sse.host.backup, sqlite_backup, files)
    points = crash_points(modules, restore)
    for point in points[:: len(points) // 10]:
        shutil.rmtree(tmp_path / "old")
        (tmp_path / "old").mkdir()
        assert dies_at(point, modules, restore)
        if store.exists():
            with pytest.raises(StoreError, match="the host has a store"):
                restore_store(config, tmp_path / "backup")
        else:
            restore_store(config, tmp_path / "backup")
        assert [path.name for path in store.parent.iterdir() if path.name.startswith(".")] == []
