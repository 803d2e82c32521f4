"""Chains of plaintext images: what is stated to tools, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from support import images
from virt_sse.errors import DiskInUseError, ImageError, ImageFormatError
from virt_sse.qemu.backing_chain import opened_chain

M = 1 << 20
BACKING_FORMAT = bytes.fromhex("E2792ACA")
"""Type of the header extension with the format of the backing file (QEMU ``docs/interop/qcow2.txt``)."""


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "bwrap")


def make(path: Path, *options: str | Path, size: Sequence[str] = ()) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, *size], check=True)
    return path


def test_a_chain_is_stated_as_a_whole(tmp_path: Path) -> None:
    named = tmp_path / "base, with = odd name"
    named.write_bytes(bytes(M))
    middle = make(tmp_path / "middle é", "-F", "raw", "-b", named)
    top = make(tmp_path / "top", "-F", "qcow2", "-b", middle)
    with opened_chain(top, "qcow2") as chain:
        assert chain.paths == (top, middle, named)
        assert chain.size == M
        assert chain.source.node["backing"] == {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(middle)},
            "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(named)}},
        }
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(
                ["qemu-io", "-f", "qcow2", "-c", "write 0 512", top], check=True, capture_output=True
            )


def test_chains_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", size=["1M"])
    top = make(tmp_path / "top", "-F", "qcow2", "-b", base)
    unstated = make(tmp_path / "unstated", "-F", "qcow2", "-b", base)
    content = unstated.read_bytes()
    assert content.count(BACKING_FORMAT) == 1
    unstated.write_bytes(content.replace(BACKING_FORMAT, b"none"))
    data = make(tmp_path / "data", "-o", f"data_file={tmp_path / 'raw'}", size=["1M"])
    remote = make(tmp_path / "remote", "-u", "-F", "raw", "-b", "nbd:127.0.0.1:1", size=["1M"])
    for image, reason in (
        (unstated, "not stated"),
        (data, "refers to another file|external data file"),
        (remote, "no file of this host"),
    ):
        with pytest.raises(ImageFormatError, match=reason), opened_chain(image, "qcow2"):
            pass
    with pytest.raises(ImageFormatError, match=r"the format of .* is vmdk"), opened_chain(top, "vmdk"):
        pass
    subprocess.run(["qemu-img", "rebase", "-u", "-b", top, "-F", "qcow2", base], check=True)
    with pytest.raises(ImageFormatError, match="form a loop"), opened_chain(top, "qcow2"):
        pass
    base.unlink()
    with pytest.raises(ImageFormatError, match="is missing"), opened_chain(top, "qcow2"):
        pass
    with pytest.raises(ImageError, match="cannot read"), opened_chain(base, "qcow2"):
        pass


def test_an_image_in_use_is_refused_unless_shared(tmp_path: Path) -> None:
    image = make(tmp_path / "image", size=["1M"])
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,filename={image},node-name=a"]
    export = ["--nbd-server", f"addr.type=unix,addr.path={tmp_path / 's'}", "--export"]
    export += ["type=nbd,id=e,node-name=a,writable=on"]
    with subprocess.Popen([*command, *export, "--pidfile", str(tmp_path / "pid")]) as daemon:
        try:
            while not (tmp_path / "pid").exists():
                assert daemon.poll() is None
            with pytest.raises(DiskInUseError), opened_chain(image, "qcow2"):
                pass
            with opened_chain(image, "qcow2", shared=True) as chain:
                assert chain.size == M
        finally:
            daemon.kill()
