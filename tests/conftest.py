from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command_line import CommandLine
from support.hosts import host_folder
from virt_sse.backend import Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's files under the test's own folder; no libvirt answers there, not even this machine's."""
    return host_folder(tmp_path / "root", monkeypatch)


@pytest.fixture
def backend(root: Path) -> Iterator[Backend]:
    """The backend of that host, initialised."""
    with Backend.open(root) as backend:
        backend.init_host()
        yield backend


@pytest.fixture
def virt_sse(root: Path) -> CommandLine:
    """The command line on that host; initialise it with ``backend`` or ``host init``."""
    return CommandLine(root)
