"""The library for guests: installed, replaced, removed, and recognised in processes."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from support import images
from support.waiting import wait_until
from virt_sse.system import acceleration
from virt_sse.system.files import write_shared
from virt_sse.system.guest_library import GuestLibrary, LibraryInUse, digest
from virt_sse.system.running_process import command_line, environment, mapped_files, qemu_process


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that all users can read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def library(root: Path) -> GuestLibrary:
    if reason := acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    return GuestLibrary.of(root, root / "var/lib/virt-sse")


@contextmanager
def process(*preloaded: Path, program: str = "qemu-io") -> Iterator[int]:
    """A process that stands still, with these libraries."""
    images.require(program)
    variables = {"LD_PRELOAD": ":".join(map(str, preloaded))}
    pipe = subprocess.PIPE
    with subprocess.Popen([program], env=os.environ | variables, stdin=pipe, stdout=pipe) as running:
        try:
            wait_until(lambda: mapped_files(running.pid), "the process has started")
            assert running.stdin
            assert running.stdout
            if program == "cat":
                running.stdin.write(b"x")
                running.stdin.flush()
            running.stdout.read(1)  # constructors have run
            yield running.pid
        finally:
            running.kill()


def test_the_library_is_installed_and_removed(library: GuestLibrary) -> None:
    assert not library.is_wanted
    assert "is missing" in str(library.obstacle())
    assert library.install()
    assert not library.install()
    assert library.is_wanted
    assert library.obstacle() is None
    assert not library.is_outdated
    assert stat.S_IMODE(library.path.stat().st_mode) == 0o644
    assert stat.S_IMODE(library.record.stat().st_mode) == 0o600
    assert library.remove()
    assert not library.remove()
    assert not library.is_wanted


def test_a_kill_between_record_and_file_leaves_a_wanted_library(library: GuestLibrary) -> None:
    library.record.parent.mkdir(parents=True)
    library.record.write_text(f"{digest(acceleration.LIBRARY)}\n")
    assert library.is_wanted
    assert "is missing" in str(library.obstacle())
    assert library.install()
    assert library.obstacle() is None


def test_a_changed_library_is_replaced_without_a_change_to_running_processes(library: GuestLibrary) -> None:
    library.install()
    content = library.path.read_bytes()
    earlier = content + b"earlier"
    with process(library.path) as current:
        write_shared(library.path, earlier)
        assert "not a library that virt-sse has installed" in str(library.obstacle())
        assert library.is_outdated
        with process(library.path) as unknown:
            assert library.in_use(unknown) is LibraryInUse.UNKNOWN
            library.record.write_text(f"{hashlib.sha256(earlier).hexdigest()}\nnoise\n")
            assert library.obstacle() is None
            assert library.in_use(unknown) is LibraryInUse.EARLIER
            assert library.install()
            assert library.in_use(unknown) is LibraryInUse.EARLIER
        assert library.in_use(current) is LibraryInUse.CURRENT
        assert library.path.read_bytes() == content
        library.remove()
        assert library.in_use(current) is LibraryInUse.CURRENT


def test_the_worst_of_several_libraries_counts(library: GuestLibrary, root: Path) -> None:
    library.install()
    other = root / "other" / library.path.name
    other.parent.mkdir()
    other.write_bytes(library.path.read_bytes() + b"x")
    with process(library.path, other) as pid:
        assert library.in_use(pid) is LibraryInUse.UNKNOWN


def test_a_process_without_nettle_has_no_gain(library: GuestLibrary) -> None:
    library.install()
    with process(library.path, program="cat") as pid:
        assert library.in_use(pid) is LibraryInUse.INEFFECTIVE
    with process() as pid:
        assert library.in_use(pid) is LibraryInUse.ABSENT


def test_a_process_that_has_ended_has_nothing(library: GuestLibrary, root: Path) -> None:
    gone = 1 << 30
    assert library.in_use(gone) is LibraryInUse.ABSENT
    assert mapped_files(gone) == environment(gone) == command_line(gone) == []
    (root / "pid").write_text(str(os.getpid()))
    assert qemu_process(root / "pid", uuid4()) is None


def test_permissions_are_an_obstacle(library: GuestLibrary) -> None:
    library.install()
    library.path.chmod(0o666)
    assert "other users may write" in str(library.obstacle())
    assert library.install()
    assert library.obstacle() is None
