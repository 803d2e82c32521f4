"""A libvirtd that accepts connections and does not answer costs seconds, not the caller."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import wait_until
from virt_sse.errors import LibvirtSilentError, LibvirtUnavailableError
from virt_sse.libvirt import connection
from virt_sse.libvirt.connection import connected


@pytest.fixture
def silent(short_folder: Path) -> Iterator[tuple[str, socket.socket]]:
    """The URI of a libvirt that never answers, and its listening socket."""
    path = short_folder / "libvirt-sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(16)
        yield f"qemu+unix:///system?socket={path}", listening


def attempts() -> int:
    return sum(thread.name == "libvirt-open" for thread in threading.enumerate())


def test_a_silent_libvirt_is_given_up_and_later_attempts_fail_early(
    silent: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, listening = silent
    monkeypatch.setattr(connection, "_OPEN_SECONDS", 0.5)
    monkeypatch.setattr(connection, "_AGAIN_SECONDS", 0.1)
    began = time.monotonic()
    for _ in range(5):
        with pytest.raises(LibvirtSilentError, match="does not answer within 0"), connected(uri):
            pass
    assert 0.5 + 4 * 0.1 <= time.monotonic() - began < 3
    assert attempts() == 1, "a hung libvirtd holds one thread, however often it is tried"
    listening.close()
    wait_until(lambda: attempts() == 0, "the attempt ends with the socket")
    with pytest.raises(LibvirtUnavailableError) as caught, connected(uri):
        pass
    assert not isinstance(caught.value, LibvirtSilentError)
