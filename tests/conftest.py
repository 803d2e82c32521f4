from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support.command_line import CommandLine
from support.hosts import host_folder
from support.postgresql import PostgresqlServer
from virt_sse.backend import Backend
from virt_sse.host.setup import initialise
from virt_sse.system.database_url import sqlite_url


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew")
    parser.addoption("--moved-disks", type=int, default=10, help="disks of the store that moves; e.g. 200")
    parser.addoption("--races", type=int, default=10, help="starts that two hosts race for; e.g. 100")
    parser.addoption("--fuzz-seconds", type=float, default=0.5, help="duration of each fuzzer")


def pytest_collection_finish() -> None:
    """Spare the collector, in this process and in forked ones, all objects that stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """How long to fuzz each parser."""
    return float(request.config.getoption("--fuzz-seconds"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's files under the test's own folder; no libvirt answers there, not even this machine's."""
    return host_folder(tmp_path / "root", monkeypatch)


@pytest.fixture
def backend(root: Path) -> Iterator[Backend]:
    """The backend of the host, initialised."""
    with Backend.open(root) as backend:
        initialise(backend.host)
        yield backend


@pytest.fixture
def virt_sse(root: Path) -> CommandLine:
    """The command line on the host; initialise the host with ``backend`` or ``host init``."""
    return CommandLine(root)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets, which other users may pass through."""
    with TemporaryDirectory(prefix="virt-sse-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server; the test is skipped where PostgreSQL or psycopg is not installed."""
    with TemporaryDirectory(prefix="virt-sse-") as name:
        Path(name).chmod(0o711)
        server = PostgresqlServer(Path(name))
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store of the test's own: a missing SQLite file, and an empty store in PostgreSQL."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "state/store.sqlite")
        return
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    with server.database() as name:
        yield server.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store that does not exist yet: a missing SQLite file, and an empty database."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "state/store.sqlite")
        return
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    with server.database(template="template0") as name:
        yield server.url(name)


@pytest.fixture
def as_root() -> None:
    """Skip the test unless root runs it; the test is marked ``root``."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


_MARKS = {
    "as_root": {"root"},
    "lab_host": {"root", "libvirt"},
    "second_lab_host": {"root", "libvirt"},
    "acceleration": {"kvm"},
    "linux_micro": {"tcg"},
}
"""The marks of a test that uses a fixture, directly or through another fixture."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by what its fixtures need."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        marks = {mark for name in fixtures for mark in _MARKS.get(name, ())}
        if "tcg" in marks:
            marks.discard("kvm")  # the accelerator of linux-micro is probed, too
        for mark in sorted(marks):
            item.add_marker(mark)
