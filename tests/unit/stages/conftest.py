from __future__ import annotations

from pathlib import Path

import pytest

from virt_sse.libvirt.users import User


@pytest.fixture
def folder(short_folder: Path) -> Path:
    return short_folder


@pytest.fixture
def user(as_root: None) -> User:
    """A user that is not root and owns nothing; only root can run a process as this user."""
    return User(64901, 64902)
