"""A store in PostgreSQL: outages, failover, read-only servers, passwords."""

from __future__ import annotations

import logging
import socket
import traceback
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_store import disk

from support.postgresql import PASSWORD, WITH_PASSWORD, PostgresqlServer
from virt_sse.errors import StoreError, StoreReadOnlyError, StoreUnavailableError
from virt_sse.model.hosts import HostIdentity
from virt_sse.store import LazyStore
from virt_sse.store.store import Store
from virt_sse.vault.home.certificates import new_authority, new_server_certificate

SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
"""SSLRequest (PostgreSQL, "Message Formats")."""


@pytest.fixture
def database(postgresql: PostgresqlServer) -> Iterator[str]:
    with postgresql.database() as name:
        yield name


def test_a_store_outlives_a_restart_of_the_server(postgresql: PostgresqlServer, database: str) -> None:
    with closing(Store(postgresql.url(database))) as store:
        store.add(one := disk("one"))
        postgresql.stop()
        try:
            for action in (store.all, lambda: store.add(disk("two")), lambda: store.encryption_sets.all()):
                with pytest.raises(StoreUnavailableError, match="the store failed: ") as caught:
                    action()
                assert caught.value.hint
            with pytest.raises(StoreUnavailableError, match="cannot open the store: "):
                Store(postgresql.url(database))
        finally:
            postgresql.start()
        assert store.all() == [one]
        store.add(disk("two"))


def test_a_session_ended_by_the_server_is_replaced(postgresql: PostgresqlServer, database: str) -> None:
    with closing(Store(postgresql.url(database))) as store:
        postgresql.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"  # noqa: S608
        )
        store.add(one := disk("one"))
        assert store.all() == [one]


def test_a_read_only_server_answers_queries_until_the_failover(
    postgresql: PostgresqlServer, database: str
) -> None:
    url = postgresql.url(database)
    with closing(Store(url)) as store:
        store.add(one := disk("one"))
        postgresql.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        with closing(Store(url)) as read_only:
            assert read_only.all() == [one]
            with pytest.raises(StoreReadOnlyError, match="read-only") as caught:
                read_only.add(disk("two"))
            assert caught.value.hint
            postgresql.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
            read_only.add(disk("two"))  # on a new connection
        assert len(store.all()) == 2


def test_a_store_without_tables_on_a_read_only_server_is_refused(postgresql: PostgresqlServer) -> None:
    with postgresql.database(template="template0") as name:
        postgresql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with pytest.raises(StoreReadOnlyError, match="cannot open the store"):
            Store(postgresql.url(name))


def test_a_lock_is_waited_for_with_a_limit(
    postgresql: PostgresqlServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setattr("virt_sse.store.engine.BUSY_TIMEOUT_SECONDS", 0.2)
    with (
        closing(Store(postgresql.url(database))) as store,
        psycopg.connect(host=str(postgresql.folder), user="virt_sse", dbname=database) as other,
    ):
        other.execute("LOCK TABLE disks")
        with pytest.raises(StoreError, match="lock timeout"):
            store.add(disk("one"))
        other.rollback()
        store.add(disk("one"))


def test_the_password_is_in_no_error_repr_or_log(
    postgresql: PostgresqlServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good = postgresql.url(database, f"{WITH_PASSWORD}:{PASSWORD}")
    with closing(Store(good)) as store:
        store.add(disk("one"))
        shown = [repr(store), repr(store._engine), repr(store._engine.url)]
    bad = [
        good.replace("p%40ss", "wrong%40ss"),
        good.replace(WITH_PASSWORD, "unknown-role"),
        good.replace(f"/{database}", "/nowhere"),
        good.replace("virt-sse-", "no-folder-"),
        f"{good}&no-such-option=1",
    ]
    for url in bad:
        lazy = LazyStore(url)
        shown.append(repr(lazy))
        with pytest.raises(StoreError) as caught:
            lazy.full()
        shown += [str(caught.value), str(caught.value.hint), *traceback.format_exception(caught.value)]
    shown += [caplog.text, postgresql.log]
    assert "never-shown" not in "\n".join(shown)


@pytest.mark.parametrize("option", ["", "&sslmode=verify-full"])
def test_a_server_without_tls_gets_no_password(option: str) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def refuse_tls() -> bytes:
            listener.settimeout(30)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(30)
                received = connection.recv(100)
                connection.sendall(b"N")
                return received + connection.recv(100)

        received = pool.submit(refuse_tls)
        port = listener.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match="SSL"):
            Store(f"postgresql://virt_sse:secret@127.0.0.1:{port}/db?sslrootcert=system{option}")
        assert received.result(30) == SSL_REQUEST


def test_a_store_has_few_idle_sessions(postgresql: PostgresqlServer, database: str) -> None:
    with closing(Store(postgresql.url(database))) as store:
        for number in range(3):
            store.add(disk(f"disk-{number}"))
        query = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"  # noqa: S608
        assert postgresql.execute(query) == [(1,)]
        idle = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND state = 'idle'"  # noqa: S608
        assert postgresql.execute(idle) == [(1,)]


def test_a_server_has_to_prove_its_name_by_the_right_authority(
    postgresql: PostgresqlServer, database: str, tmp_path: Path
) -> None:
    authority, key = new_authority("db")
    good, wrong, missing = (tmp_path / name for name in ("good.pem", "wrong.pem", "missing.pem"))
    good.write_bytes(authority)
    wrong.write_bytes(new_authority("db")[0])
    with postgresql.over_tls(new_server_certificate(authority, key, ("localhost",))) as port:
        place = f"{WITH_PASSWORD}:{PASSWORD}@localhost:{port}/{database}"
        for option in ("", "&sslmode=verify-full"):
            with closing(Store(f"postgresql://{place}?sslrootcert={good}{option}")) as store:
                with store._engine.connect() as connection:
                    tls = connection.scalar(
                        sa.text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                    )
                assert tls is True
        refusals = {
            f"{place}?sslrootcert={wrong}": "certificate verify failed",
            f"{place}?sslrootcert={missing}": "missing.pem",
            f"{place.replace('localhost', '127.0.0.1')}?sslrootcert={good}": "does not match host name",
        }
        for url, reason in refusals.items():
            with pytest.raises(StoreUnavailableError, match=reason) as caught:
                Store(f"postgresql://{url}")
            assert "never-shown" not in str(caught.value)


MANY = """
INSERT INTO hosts SELECT md5('host' || n)::uuid, 'host-' || n, md5('boot' || n)::uuid, 0
    FROM generate_series(0, 99) n;
INSERT INTO disks (id, name, path, format, size, state, encryption_type, created, generation, path_number)
    SELECT md5(n::text)::uuid, 'disk-' || n, '/images/' || n, 'raw', 512, 'ready',
           'EncryptionAtRestWithPlatformKey', '2026-01-31T12:00:00+00:00', 1, n
    FROM generate_series(1, 10000) n;
INSERT INTO wrapped_deks SELECT id, 0, 'service', 'aes-256-xts', 'A256KW', '\\x00', 'p', 'n', '1' FROM disks;
INSERT INTO leases SELECT id, md5('host' || path_number % 100)::uuid FROM disks;
INSERT INTO lease_users SELECT id, md5('vm' || path_number / 4)::uuid, 0 FROM disks;
ANALYZE;
"""


def test_starts_and_polls_read_no_whole_table(postgresql: PostgresqlServer, database: str) -> None:
    """With 10,000 disks on 100 hosts."""
    for statement in MANY.split(";")[:-1]:
        postgresql.execute(statement, database)
    row = postgresql.execute("SELECT id, boot_id, name FROM hosts LIMIT 1", database)[0]
    host = HostIdentity(row[0], row[2], row[1])
    ids = [found[0] for found in postgresql.execute("SELECT id FROM disks LIMIT 100", database)]
    statements: list[tuple[str, object]] = []
    with closing(Store(postgresql.url(database))) as store:
        sa.event.listen(store._engine, "before_cursor_execute", lambda *of: statements.append(of[2:4]))
        assert len(store.with_ids(ids)) == 100
        assert store.unfinished() == store.deleted() == store.based_on(ids[0]) == store.made_of(ids[0]) == []
        assert store.paths_since(10_000) == (10_000, {})
        assert len(store.hosts.uses(host)) == 100
        store.hosts.release(host, uuid.uuid4())
        seen = list(statements)
        with store._engine.connect() as connection:
            for statement, parameters in seen:
                if statement.startswith("SELECT"):
                    plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
                    whole = [line for line in plan if "Seq Scan on" in line]
                    tables = ("disks", "wrapped_deks", "leases", "lease_users")
                    assert not any(f"on {table}" in line for line in whole for table in tables), plan
    assert len(seen) > 6
