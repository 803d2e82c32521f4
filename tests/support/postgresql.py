"""A PostgreSQL server for tests: under a user without privileges, on a Unix socket, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.waiting import wait_until
from virt_sse.lab.vaults import free_port
from virt_sse.store.store import Store
from virt_sse.system.files import write_private

OWNER = "virt_sse"
WITH_PASSWORD = "with_password"  # noqa: S105 -- the name of a role
PASSWORD = "p%40ss-never-shown"  # noqa: S105 -- of a server in a temporary folder

_HBA = (
    f"local all {WITH_PASSWORD} scram-sha-256\nlocal all all trust\n"
    f"hostssl all {WITH_PASSWORD} 127.0.0.1/32 scram-sha-256\n"
)
_SETTINGS = {
    "port": "5432",
    "listen_addresses": "",
    "autovacuum": "off",
    "max_connections": "200",
    "log_statement": "none",
}
_FORGETFUL = {"fsync": "off", "full_page_writes": "off"}


def _programs() -> Path:
    """The folder with the server's programs; Debian keeps them apart from PATH."""
    found = [Path(path).parent for path in [shutil.which("postgres")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    for folder in reversed(found):
        if (folder / "initdb").exists():
            return folder
    pytest.skip("PostgreSQL's server is not installed (Debian's package 'postgresql')")


class PostgresqlServer:
    """A server in *folder*, started; ends with this process. Its databases sort texts as in English.

    :param is_durable: whether commits survive a crash of the machine, as in production.
    """

    def __init__(self, folder: Path, *, is_durable: bool = False) -> None:
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        self.folder = folder
        self._programs = _programs()
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = ""
        self._number = 0
        self._settings = _SETTINGS if is_durable else _SETTINGS | _FORGETFUL
        self._user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._user = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        locale = ["--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US", "--encoding=UTF8"]
        options = ["--auth=trust", f"--username={OWNER}", "--no-sync", "--no-instructions", *locale]
        self._run("initdb", *options, "--pgdata", str(self._data))
        (self._data / "pg_hba.conf").write_text(_HBA)
        self.start()
        self.execute(f"CREATE DATABASE store_template OWNER {OWNER}")
        Store(self.url("store_template")).close()
        self.execute(f"CREATE ROLE {WITH_PASSWORD} SUPERUSER LOGIN PASSWORD 'p@ss-never-shown'")

    @property
    def log(self) -> str:
        """The server's log."""
        return (self.folder / "log").read_text()

    def start(self, **settings: str) -> None:
        """Start the server, and wait until the server answers.

        :param settings: as in ``postgresql.conf``.
        """
        settings = self._settings | {"unix_socket_directories": str(self.folder)} | settings
        self._port = settings["port"]
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", str(self._data), *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        wait_until(self._answers, "PostgreSQL answers")

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the server and all sessions at once, durably (a "fast shutdown")."""
        if self._process:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def url(self, database: str, user: str = OWNER) -> str:
        """The URL of a database."""
        return f"postgresql+psycopg://{user}@/{database}?host={self.folder}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement; its rows, if any."""
        import psycopg

        with psycopg.connect(
            host=str(self.folder), user=OWNER, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def over_tls(self, certificate: bytes) -> Iterator[int]:
        """Restart the server, with a free port of the loopback address and TLS, for the time of the block.

        :param certificate: of the server, with its private key; PEM.
        """
        file = self._data / "server.pem"
        write_private(file, certificate)
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(file, user.pw_uid, user.pw_gid)
        port = free_port()
        self.stop()
        self.start(
            listen_addresses="127.0.0.1",
            port=str(port),
            ssl="on",
            ssl_cert_file=file.name,
            ssl_key_file=file.name,
        )
        try:
            yield port
        finally:
            self.stop()
            self.start()

    @contextlib.contextmanager
    def database(self, *, template: str = "store_template") -> Iterator[str]:
        """The name of a new database, a copy of *template*: ``template0`` is empty."""
        self._number += 1
        name = f"test_{self._number}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield name
        finally:
            if self._process:
                self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        return not self._run(
            "pg_isready", "--quiet", f"--host={self.folder}", f"--port={self._port}", check=False
        ).returncode

    def _run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(self._command(program, *arguments), capture_output=True, cwd="/")
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def _command(self, program: str, *arguments: str) -> list[str]:
        return ["setpriv", *self._user, "--pdeathsig=INT", str(self._programs / program), *arguments]
