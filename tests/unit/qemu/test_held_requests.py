from __future__ import annotations

import errno
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import images
from virt_sse.qemu import held_requests
from virt_sse.qemu.held_requests import HeldRequests

M = 1 << 20


@contextmanager
def serving(path: Path, arrived: threading.Event) -> Iterator[HeldRequests]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        held = HeldRequests(listener, M, arrived)
        held.start()
        yield held


@contextmanager
def image_served(folder: Path) -> Iterator[Path]:
    """The socket of an NBD server of an image full of 0x11."""
    image, path = folder / "image", folder / "nbd"
    image.write_bytes(b"\x11" * M)
    command = ["qemu-nbd", "-f", "raw", "-k", str(path), "-x", "way", "--persistent", "--fork", str(image)]
    subprocess.run([*command, "--pid-file", str(folder / "pid")], check=True)
    yield path
    subprocess.run(["kill", (folder / "pid").read_text().strip()], check=True)


def io(path: Path, *commands: str) -> str:
    arguments = [part for command in commands for part in ("-c", command)]
    uri = f"nbd+unix:///any?socket={path}"
    done = subprocess.run(["qemu-io", "-f", "raw", *arguments, uri], capture_output=True, text=True)
    return done.stdout + done.stderr


def flush(path: Path) -> int:
    """The error number of a flush, which qemu-io does not print."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(path))
        answers.read(18)
        client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, 0))
        answers.read(52)
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, 1, 0, 0))
        _, error, _ = struct.unpack(">IIQ", answers.read(16))
        return int(error)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-io", "qemu-nbd")


def test_a_request_held_too_long_fails(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_requests, "HELD_SECONDS", 0.05)
    with serving(short_folder / "held", arrived := threading.Event()) as held:
        assert flush(short_folder / "held") == errno.EIO
        held.note_closed()
        assert flush(short_folder / "held") == 0
        assert not arrived.is_set(), "a flush is no request for data"
        for command in ("write 0 4k", "read 0 4k", "discard 0 4k"):
            assert "Input/output error" in io(short_folder / "held", command)
        assert arrived.is_set()


def test_requests_are_passed_on_and_held_again(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_requests, "HELD_SECONDS", 0.05)
    path = short_folder / "held"
    with serving(path, threading.Event()) as held, image_served(short_folder) as image:
        held.pass_on(str(image), "way")
        said = io(path, "length", "read -P 0x11 0 1M", "write -P 0x22 4k 4k", "write -z 8k 4k", "flush")
        assert "1 MiB" in said
        assert "failed" not in said
        assert "failed" not in io(path, "read -P 0x22 4k 4k", "read -P 0 8k 4k")
        held.hold()
        assert "Input/output error" in io(path, "read 0 4k")
    content = (short_folder / "image").read_bytes()
    assert content[4096:12288] == b"\x22" * 4096 + bytes(4096)


def test_nonsense_ends_a_connection(short_folder: Path) -> None:
    path = short_folder / "held"
    with serving(path, threading.Event()), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(bytes(4) + b"IHAVEOPT" + b"\xff" * 8)
        client.settimeout(20)
        assert client.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
        assert client.recv(1) == b""
