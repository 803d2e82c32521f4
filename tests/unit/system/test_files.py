from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.faults import no_file_beyond
from virt_sse.system.files import (
    canonical,
    private_folder,
    publish,
    sync_folder,
    unnamed_file,
    write_at,
    write_private,
)


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
def test_a_private_file_is_written_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for content in (b"first", b"", bytes(3_000_000)):
        write_private(path, content)
        assert path.read_bytes() == content
        assert mode(path) == 0o600
        assert list(tmp_path.iterdir()) == [path]


def test_replacing_a_file_tightens_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o644)
    write_private(path, b"secret")
    assert mode(path) == 0o600


def test_replacing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"theirs")
    link.symlink_to(target)
    write_private(link, b"ours")
    assert target.read_bytes() == b"theirs"
    assert not link.is_symlink()


def test_without_room_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_private(path, b"old")
    with no_file_beyond(1000), pytest.raises(OSError, match="File too large"):
        write_private(path, bytes(2000))
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


def test_an_unnamed_file_leaves_nothing_unless_it_is_published(tmp_path: Path) -> None:
    with unnamed_file(tmp_path) as descriptor:
        write_at(descriptor, b"given up", 0)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []

    path = tmp_path / "image"
    with unnamed_file(tmp_path) as descriptor:
        write_at(descriptor, b"whole", 0)
        publish(Path(f"/proc/self/fd/{descriptor}"), path)
    assert path.read_bytes() == b"whole"
    assert mode(path) == 0o600


def test_publishing_never_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"theirs")
    with unnamed_file(tmp_path) as descriptor, pytest.raises(FileExistsError):
        publish(Path(f"/proc/self/fd/{descriptor}"), path)
    assert path.read_bytes() == b"theirs"
