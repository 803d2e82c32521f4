from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from virt_sse.errors import ImageError
from virt_sse.qemu import nbd
from virt_sse.qemu.nbd import NbdReader

GREETING = b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QH", 1000, 3)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, servers = socket.socketpair()
    with ours, servers:
        yield ours, servers


def reply(content: bytes, *, error: int = 0, number: int = 1, magic: int = 0x67446698) -> bytes:
    return struct.pack(">IIQ", magic, error, number) + content


def test_reads_beyond_the_end_are_cut_off(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, server = ends
    server.sendall(GREETING + reply(b"y" * 10))
    reader = NbdReader(ours, "image")
    assert reader.size == 1000
    assert reader.read(990, 100) == b"y" * 10
    assert reader.read(1000, 1) == reader.read(2**70, 1) == reader.read(5, 0) == b""
    asked = server.recv(1000)
    assert asked[:4] == struct.pack(">I", 3)
    assert asked[4:25] == b"IHAVEOPT" + struct.pack(">II", 1, 5) + b"image"
    assert asked[25:] == struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 990, 10)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "does not speak NBD"),
        (GREETING[:20], "closed the connection"),
        (GREETING, "closed the connection"),
        (GREETING + reply(b"", error=5), "cannot read 10 bytes at 0: error 5"),
        (GREETING + reply(b"x" * 10, number=2), "violates the protocol"),
        (GREETING + reply(b"x" * 10, magic=7), "violates the protocol"),
        (GREETING + reply(b"x" * 9), "closed the connection"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_an_error(
    ends: tuple[socket.socket, socket.socket], said: bytes, error: str
) -> None:
    ours, server = ends
    server.sendall(said)
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(ImageError, match=error):
        NbdReader(ours, "image").read(0, 10)


def test_a_server_that_sends_one_byte_at_a_time_is_an_error(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes long before the time limit."""
    monkeypatch.setattr(nbd, "_TIMEOUT", 0.3)
    ours, server = ends
    server.sendall(GREETING)
    reader = NbdReader(ours, "image")

    def trickle() -> None:
        with contextlib.suppress(OSError):
            for byte in reply(b"y" * 10):
                server.sendall(bytes([byte]))
                time.sleep(0.05)

    sending = threading.Thread(target=trickle)
    sending.start()
    with pytest.raises(ImageError, match="does not answer: timed out"):
        reader.read(0, 10)
    ours.close()
    sending.join(10)
