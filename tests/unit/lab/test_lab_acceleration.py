from __future__ import annotations

from pathlib import Path

import pytest

from virt_sse.lab import cache
from virt_sse.lab.acceleration import Acceleration


def test_an_acceleration_prints_with_its_reason() -> None:
    assert str(Acceleration("boot-sector", "kvm")) == "boot-sector: kvm"
    slow = Acceleration("linux-micro", "qemu", "there is no /dev/kvm")
    assert str(slow) == "linux-micro: qemu (TCG), because there is no /dev/kvm"


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRT_SSE_LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / "virt-sse/lab"
    monkeypatch.setenv("VIRT_SSE_LAB_CACHE", str(tmp_path / "chosen"))
    assert cache.cache_directory() == tmp_path / "chosen"
    assert cache.cache_directory().is_dir()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder/file"
    cache.replace(path, b"old")
    cache.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
