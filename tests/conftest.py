from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command_line import CommandLine, no_libvirt
from virt_sse.backend import Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's files under a folder of its own, where no libvirt answers: this machine's is never asked."""
    root = tmp_path / "root"
    (root / "var/lib/libvirt/images").mkdir(parents=True)
    monkeypatch.setenv("VIRT_SSE_ROOT", str(root))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", no_libvirt(root))
    return root


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
