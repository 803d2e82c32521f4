from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_sse.errors import LabError
from virt_sse.lab import directories


@pytest.fixture
def base() -> Iterator[Path]:
    """A short path, as sockets need it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as name:
        yield Path(name)


def test_a_living_directory_is_not_swept(base: Path) -> None:
    made = directories.create(base)
    (made.path / "file").touch()
    assert made.path.stat().st_mode & 0o777 == 0o711
    assert directories.sweep(base) == []
    made.remove()
    assert list(base.iterdir()) == []


def test_a_directory_without_an_owner_is_swept(base: Path) -> None:
    made = directories.create(base)
    (made.path / "folder").mkdir()
    (made.path / "folder/file").touch()
    os.close(made.lock)
    assert directories.sweep(base) == [made.path]
    assert list(base.iterdir()) == []


def test_the_lock_lives_as_long_as_a_process_that_was_given_it(base: Path) -> None:
    made = directories.create(base)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[made.lock]
    ) as heir:
        os.close(made.lock)
        assert directories.sweep(base) == []
        heir.communicate(b"\n")
    assert directories.sweep(base) == [made.path]


def test_a_directory_of_no_lab_is_not_swept(base: Path) -> None:
    (base / "something-else").mkdir()
    (base / f"{directories.PREFIX}file").touch()
    target = base / "target"
    target.mkdir()
    (base / f"{directories.PREFIX}link").symlink_to(target)
    assert directories.sweep(base) == []
    assert len(list(base.iterdir())) == 4


@pytest.mark.usefixtures("as_root")
def test_the_directory_of_another_user_is_not_swept(base: Path) -> None:
    foreign = base / f"{directories.PREFIX}foreign"
    foreign.mkdir()
    os.chown(foreign, 65534, 65534)
    assert directories.sweep(base) == []
    assert foreign.exists()


def test_a_base_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="too long a path for the Unix sockets"):
        directories.create(tmp_path / ("x" * 80))


@pytest.mark.parametrize("hidden", ["/run", "/etc/libvirt/x", "/var/lib/libvirt"])
def test_a_base_that_the_host_would_hide_is_refused(hidden: str) -> None:
    with pytest.raises(LabError, match="own mounts hide this directory"):
        directories.create(Path(hidden))


def test_a_missing_base_is_refused(base: Path) -> None:
    with pytest.raises(LabError, match="No such file or directory"):
        directories.create(base / "absent")
