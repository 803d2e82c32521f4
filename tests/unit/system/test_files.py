from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.faults import no_file_beyond
from support.forking import Report, fork, run_forked
from virt_sse.system.files import (
    canonical,
    complete_file,
    private_folder,
    sync_folder,
    write_as_single_writer,
    write_at,
    write_new,
    write_private,
)

Write = Callable[[Path, bytes], None]
each_writer = pytest.mark.parametrize("write", [write_private, write_as_single_writer])


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.usefixtures("umask")
def test_a_private_folder_is_ours_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state/keys"
    assert private_folder(folder) == folder
    assert mode(folder) == 0o700


def test_an_existing_folder_is_kept_and_tightened(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "file").touch()
    assert mode(private_folder(folder)) == 0o700
    assert (folder / "file").exists()


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "keys").touch()
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "keys")


@pytest.mark.usefixtures("umask")
@each_writer
def test_a_private_file_is_written_and_replaced_whole(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "key"
    for content in (b"first", b"", bytes(3_000_000)):
        write(path, content)
        assert path.read_bytes() == content
        assert mode(path) == 0o600
        assert list(tmp_path.iterdir()) == [path]


@each_writer
def test_replacing_a_file_tightens_its_mode(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "key"
    path.touch(0o644)
    write(path, b"secret")
    assert mode(path) == 0o600


@each_writer
def test_replacing_a_link_leaves_what_it_points_to(tmp_path: Path, write: Write) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"theirs")
    link.symlink_to(target)
    write(link, b"ours")
    assert target.read_bytes() == b"theirs"
    assert not link.is_symlink()


@each_writer
def test_without_room_the_old_file_stays(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "key"
    write(path, b"old")
    with no_file_beyond(1000), pytest.raises(OSError, match="File too large"):
        write(path, bytes(2000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_private(tmp_path / "missing/key", b"")
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(IsADirectoryError):
        write_private(tmp_path / "key", b"secret")
    assert list(tmp_path.iterdir()) == [tmp_path / "key"]


def test_write_at_leaves_the_rest_alone(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"0123456789")
    with path.open("r+b") as file:
        write_at(file.fileno(), b"abc", 4)
    assert path.read_bytes() == b"0123abc789"


def test_write_at_says_when_not_all_could_be_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file, no_file_beyond(1000), pytest.raises(OSError, match="File too large"):
        write_at(file.fileno(), bytes(1500), 0)


def test_all_paths_to_a_file_have_the_same_canonical_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert canonical(Path("link/../link/disk")) == tmp_path / "real/disk"
    (tmp_path / "real/disk").symlink_to("/elsewhere")
    assert canonical(tmp_path / "link/disk") == tmp_path / "real/disk"


@pytest.fixture
def without_o_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS."""
    opened = os.open

    def refuse(path: object, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, mode, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)


@pytest.fixture
def without_links(without_o_tmpfile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FAT."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.fixture(params=[None, "without_o_tmpfile", "without_links"])
def file_system(request: pytest.FixtureRequest) -> None:
    """File systems with fewer abilities."""
    if request.param:
        request.getfixturevalue(request.param)


def test_a_complete_file_leaves_nothing_if_given_up(tmp_path: Path, file_system: None) -> None:
    path = tmp_path / "image"

    def give_up() -> None:
        with complete_file(path) as descriptor:
            write_at(descriptor, b"given up", 0)
            assert os.fstat(descriptor).st_mode & 0o777 == 0o600
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert list(tmp_path.iterdir()) == []
    with complete_file(path) as descriptor:
        write_at(descriptor, b"whole", 0)
    assert (path.read_bytes(), mode(path)) == (b"whole", 0o600)
    with pytest.raises(FileExistsError), complete_file(path) as descriptor:
        write_at(descriptor, b"other", 0)
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"whole", [path])


def test_without_o_tmpfile_the_next_call_removes_the_part_of_a_killed_process(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("without_o_tmpfile")
    path = tmp_path / "image"

    def write_a_part() -> None:
        with complete_file(path) as descriptor:
            write_at(descriptor, b"part", 0)
            os._exit(9)

    assert run_forked(write_a_part) == 9
    (part,) = tmp_path.iterdir()
    assert (part != path, mode(part)) == (True, 0o600)
    with complete_file(path) as descriptor:
        write_at(descriptor, b"whole", 0)
    assert list(tmp_path.iterdir()) == [path]


@each_writer
def test_the_temporary_file_of_a_killed_process_is_removed_by_the_next_write(
    tmp_path: Path, write: Write
) -> None:
    path = tmp_path / "root.key"
    write(path, b"before")
    child = fork(lambda report: _killed_before_rename(path, report, write))
    assert list(child.lines()) == ["about to rename"]
    child.wait()
    (left,) = (each for each in tmp_path.iterdir() if each != path)
    assert left.read_bytes() == b"key"
    other = tmp_path / f".other{left.name.removeprefix('.root.key')}"
    other.touch()
    write(path, b"after")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    assert path.read_bytes() == b"after"


def test_a_single_writer_does_not_list_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has a file per disk in one folder, and writes one at each start."""
    for name in ("listdir", "scandir"):
        monkeypatch.delattr(os, name)
    write_as_single_writer(tmp_path / "state", b"1")
    with pytest.raises(AttributeError):
        write_private(tmp_path / "state", b"2")


def _killed_before_rename(path: Path, report: Report, write: Write) -> None:
    def die(*_: object) -> None:
        report("about to rename")
        os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = die  # type: ignore[assignment, method-assign] -- in this process, which ends
    write(path, b"key")


def test_the_temporary_file_of_a_running_process_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    written: list[list[Path]] = []
    rename = Path.rename

    def write_another(source: Path, target: Path) -> Path:
        if not written:
            written.append([])
            write_private(path, b"second")
            written[0] = [each for each in tmp_path.iterdir() if each != path]
        return rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", write_another)
        write_private(path, b"first")
    assert len(written[0]) == 1
    assert path.read_bytes() == b"first"


def test_a_new_file_is_whole_and_never_replaces_a_file(tmp_path: Path, file_system: None) -> None:
    path = tmp_path / "backup"
    write_new(path, b"whole")
    assert (path.read_bytes(), mode(path)) == (b"whole", 0o600)
    with pytest.raises(FileExistsError):
        write_new(path, b"other")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"whole"
