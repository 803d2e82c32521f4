"""Service of a block node's content to this process alone.

A qemu-storage-daemon opens the node read-only, without locks, and serves the content on an unnamed socket.
The daemon is ready within 10 ms, and a read takes 50 µs; a ``qemu-img`` process per read would each take as
long as the daemon's start.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import TypeVar

from virt_sse.errors import ImageError, ToolError
from virt_sse.qemu.nbd import NbdReader, NbdWriter
from virt_sse.system.confinement import BoundFile, Confinement
from virt_sse.system.tools import running

_Client = TypeVar("_Client", bound=NbdReader)
_EXPORT = "image"
_CPU_SECONDS = 600
"""Bound for reading samples of an image."""
_QUITTING_SECONDS = 10.0
_MEMORY_OF_IMAGE = 64 << 20
"""Bytes for the tables of one image in a chain."""


@contextlib.contextmanager
def served(
    node: dict[str, object],
    secrets: Sequence[str],
    descriptors: Sequence[int],
    files: Sequence[BoundFile],
    *,
    shared: bool = True,
    confinement: Confinement | None = None,
) -> Iterator[NbdReader]:
    """Open the content of the block node *node* in a new storage daemon, which can open *files* only.

    :param shared: allow an image that a QEMU process has open for writing.
    :param confinement: with the files; default: limits for reading samples.
    :raise ToolError: When the daemon cannot open the node.
    """
    memory = (2 << 30) + len(files) * _MEMORY_OF_IMAGE
    limits = confinement or Confinement(files=files, cpu_seconds=_CPU_SECONDS, memory=memory)
    node = node | {"read-only": True, "force-share": shared}
    with _served(node, secrets, descriptors, limits, NbdReader) as reader:
        yield reader


@contextlib.contextmanager
def served_for_writing(
    node: dict[str, object], secrets: Sequence[str], descriptors: Sequence[int], confinement: Confinement
) -> Iterator[NbdWriter]:
    """As :func:`served`, for writing to the content of *node*.

    :raise ToolError: When the daemon cannot open the node.
    """
    with _served(node, secrets, descriptors, confinement, NbdWriter) as writer:
        yield writer


@contextlib.contextmanager
def _served(
    node: dict[str, object],
    secrets: Sequence[str],
    descriptors: Sequence[int],
    confinement: Confinement,
    client: type[_Client],
) -> Iterator[_Client]:
    writable = "on" if client is NbdWriter else "off"
    export = f"type=nbd,id={_EXPORT},node-name={_EXPORT},name={_EXPORT},writable={writable}"
    with _connected_socket() as (listening, connection), _socket_pair() as (ours, theirs):
        arguments = ["qemu-storage-daemon", *secrets, "--blockdev", json.dumps(node | {"node-name": _EXPORT})]
        arguments += ["--nbd-server", f"addr.type=fd,addr.str={listening.fileno()}", "--export", export]
        arguments += ["--chardev", f"socket,id=monitor,fd={theirs.fileno()}", "--monitor", "monitor"]
        given = [*descriptors, listening.fileno(), theirs.fileno()]
        with running(arguments, confinement=confinement, pass_fds=given) as daemon:
            listening.close()  # else a failure of the daemon would leave the connection waiting
            theirs.close()
            try:
                connected = client(connection, _EXPORT)
            except ImageError as exc:
                raise (daemon.failure() or exc) from exc
            try:
                yield connected
            finally:
                if confinement.has_network:
                    _quit(ours)


def _quit(monitor: socket.socket) -> None:
    """Let a storage daemon close its image and end: Ceph waits for a killed client, up to 30 s."""
    monitor.settimeout(_QUITTING_SECONDS)
    with contextlib.suppress(OSError):
        monitor.sendall(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        while monitor.recv(4096):
            pass


@contextlib.contextmanager
def _socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def _connected_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listening Unix socket and its only possible connection: the socket's name is removed."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
        with TemporaryDirectory(prefix="virt-sse-") as folder:
            address = f"{folder}/nbd"
            try:
                listening.bind(address)
                listening.listen(1)
                connection.connect(address)
            except OSError as exc:
                raise ToolError(f"cannot make a socket in {folder}: {exc.strerror}") from exc
        yield listening, connection
