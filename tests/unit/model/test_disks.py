from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import (
    MAX_SIZE,
    Disk,
    DiskState,
    check_name,
    check_path,
    check_size,
    parse_disk_size,
)
from virt_sse.model.keys import DekContext
from virt_sse.model.layers import EncryptionType

DISK = Disk(
    id=UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1"),
    name="disk",
    path=Path("/images/disk"),
    format=DiskFormat.QCOW2,
    size=512,
    state=DiskState.READY,
    encryption_type=EncryptionType.PLATFORM_KEY,
    created=datetime(2026, 1, 31, tzinfo=UTC),
    generation=1,
    deks=(),
)


def test_a_disks_size_is_a_number_of_sectors() -> None:
    assert parse_disk_size("64TiB") == MAX_SIZE
    assert parse_disk_size("1GB") == 1000**3
    for text in ("1", "511", "513", "1MB", "65T"):
        with pytest.raises(InvalidValueError) as caught:
            parse_disk_size(text)
        assert caught.value.hint


@pytest.mark.parametrize("size", [-512, 0, 1, 511, 513, MAX_SIZE + 512])
def test_an_impossible_disk_size_is_refused(size: int) -> None:
    with pytest.raises(InvalidValueError):
        check_size(size)


@pytest.mark.parametrize("name", ["a", "0", "A-b_c.d", "x" * 80, "a.qcow2", "a_"])
def test_a_valid_name_is_accepted(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "-a", ".a", "a.", "a-", "a/b", "/a", "a b", "a\n", "a\0b", "ä", "x" * 81, "x" * 10_000]
    + ["a:b", "a,b", "\udcff"],
)
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        check_name(name)
    assert len(str(caught.value)) < 500


def test_a_path_has_one_spelling(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder/other").symlink_to("image")
    for spelling in ("link/image", "folder/../folder/image", "folder//./image"):
        assert check_path(tmp_path / spelling) == (tmp_path / "folder/image").resolve()
    assert check_path(tmp_path / "link/other").name == "other"
    assert check_path(Path("image")) == Path.cwd().resolve() / "image"
    (tmp_path / "loop").symlink_to("loop")
    assert check_path(tmp_path / "loop/image").name == "image"


@pytest.mark.parametrize("path", ["/a\nb", "/a\0b", "/\x7f", "/\udcff", "/\x1f/a", "/a\uffff"])
def test_an_invalid_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidValueError):
        check_path(Path(path))


def test_an_odd_but_valid_path_is_accepted(tmp_path: Path) -> None:
    for name in ("a,b=c", "a:b", "nbd:x", "ä 猫", "'\"<&>", "%41?#"):
        assert check_path(tmp_path / name).name == name


def test_a_missing_dek_is_an_error() -> None:
    with pytest.raises(KeyError):
        DISK.dek("service")
    assert DISK.context("service") == DekContext(DISK.id, "service")
    assert dataclasses.replace(DISK, name="other").envelope.name == "other"
