from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from virt_sse.libvirt.users import User


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is as short as sockets need it, and that other users may pass through."""
    with TemporaryDirectory(prefix="virt-sse-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def user() -> User:
    """Somebody who is not root, and owns nothing."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a process as another user")
    return User(64901, 64902)
