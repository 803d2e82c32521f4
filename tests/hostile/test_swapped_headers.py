"""Headers swapped between validation and use: tools open no further file and connect nowhere."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.hostile_images import QCOW2, Canary, Header, Qcow2
from support.images import KeyedImage, require
from virt_sse.backend import Backend
from virt_sse.errors import ImageError, ImageFormatError, ToolError, VirtSseError
from virt_sse.model.disks import NewDisk
from virt_sse.qemu import image_header, img
from virt_sse.qemu.serving import served

M = 1 << 20
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="needs root: other users may lack the right to make namespaces"
    ),
]


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("bwrap", "qemu-img", "qemu-io", "qemu-storage-daemon", "cryptsetup")


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "canary")


@pytest.mark.parametrize("change", ["data file", "raw data file"])
@pytest.mark.parametrize("command", ["check", "export", "resize", "inspect", "start"])
def test_a_header_swapped_after_its_validation_opens_no_other_file(
    backend: Backend,
    tmp_path: Path,
    canary: Canary,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    command: str,
) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    clean = disk.path.read_bytes()[:4096]
    validate = image_header.validate

    def swap_afterwards(descriptor: int, image_format: Any) -> tuple[int, int]:
        with disk.path.open("r+b") as file:
            os.pwrite(file.fileno(), clean, 0)
        found = validate(descriptor, image_format)
        Header(disk).change(change, canary.path)
        return found

    commands: dict[str, Callable[[], object]] = {
        "check": lambda: backend.disks.check("disk"),
        "export": lambda: backend.transfer.export("disk", tmp_path / "exported", destination_format="raw"),
        "resize": lambda: backend.disks.resize("disk", 2 * M),
        "inspect": lambda: backend.inspector.disk(disk),
        # A start only validates. QEMU itself then opens the image, as its own user.
        "start": lambda: img.check_unlocks(disk.path, disk.format, backend.host.keys.unwrap_all(disk)),
    }
    monkeypatch.setattr(image_header, "validate", swap_afterwards)
    with pytest.raises((ImageError, ToolError), match="No such file or directory"):
        commands[command]()
    canary.assert_untouched()
    assert not (tmp_path / "exported").exists()


def _with_data_file(image: Path, canary: Canary) -> None:
    """Rewrite the plaintext qcow2 *image* in place, to name *canary* as its external data file."""
    with image.open("r+b") as file:
        header = Qcow2(file.read(65536))
        QCOW2["raw data file"][0](header, canary.path)
        os.pwrite(file.fileno(), bytes(header.content[:4096]), 0)


def test_a_source_rewritten_after_its_check_opens_no_other_file(
    backend: Backend, tmp_path: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images.make_plain(tmp_path / "source", "qcow2", bytes(M))
    info = img.info

    def rewrite_afterwards(*arguments: Any, **options: Any) -> img.ImageInfo:
        checked = info(*arguments, **options)
        _with_data_file(source, canary)
        return checked

    monkeypatch.setattr(img, "info", rewrite_afterwards)
    with pytest.raises(VirtSseError, match="No such file or directory"):
        backend.transfer.import_image(NewDisk(name="disk"), source)
    canary.assert_untouched()
    assert backend.disks.all() == []


def test_a_source_with_a_data_file_is_refused_unread(
    backend: Backend, tmp_path: Path, canary: Canary
) -> None:
    source = images.make_plain(tmp_path / "source", "qcow2", bytes(M))
    _with_data_file(source, canary)
    with pytest.raises(ImageFormatError, match=f"refers to another file, {canary.path}") as caught:
        backend.transfer.import_image(NewDisk(name="disk"), source)
    assert "--with-backing" in str(caught.value.hint)
    canary.assert_untouched()


def test_a_whole_chain_is_imported_where_that_is_asked_for(backend: Backend, tmp_path: Path) -> None:
    images.make_plain(tmp_path / "base", "raw", b"\x01" * M)
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "-b", "base", "-F", "raw", tmp_path / "middle"], check=True)
    options = f"data_file={tmp_path / 'data'}"
    top = tmp_path / "top"
    subprocess.run([*create, "-b", "middle", "-F", "qcow2", "-o", options, top], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 2 0 64k", top], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(ImageFormatError, match="refers to another file"):
        backend.transfer.import_image(NewDisk(name="refused"), top)
    disk = backend.transfer.import_image(NewDisk(name="disk"), top, with_backing=True)
    assert KeyedImage.of(backend, disk).has(0, 65536, 2)
    assert KeyedImage.of(backend, disk).has(65536, M - 65536, 1)
    remote = tmp_path / "remote"
    subprocess.run([*create, "-u", "-b", "nbd://127.0.0.1/x", "-F", "raw", remote, "1M"], check=True)
    with pytest.raises(ImageFormatError, match=r"nbd://127\.0\.0\.1/x, which is no file of this host"):
        backend.transfer.import_image(NewDisk(name="refused"), remote, with_backing=True)


def test_a_tool_connects_nowhere(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as local, socket.socket() as remote:
        local.bind(str(tmp_path / "socket"))
        local.listen(1)
        remote.bind(("127.0.0.1", 0))
        remote.listen(1)
        port = str(remote.getsockname()[1])
        servers: list[dict[str, object]] = [
            {"type": "unix", "path": str(tmp_path / "socket")},
            {"type": "inet", "host": "127.0.0.1", "port": port},
        ]
        for server in servers:
            with (
                pytest.raises(ToolError, match=r"No such file or directory|Connection refused"),
                served({"driver": "nbd", "server": server}, [], [], []),
            ):
                pass
        for listening in (local, remote):
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()
