"""NBD client (NBD ``doc/proto.md``): fixed newstyle handshake, simple replies."""

from __future__ import annotations

import errno
import socket
import struct
import time

from virt_sse.errors import ImageError
from virt_sse.qemu import nbd_protocol as nbd

_TIMEOUT, _SLOWEST = 30.0, 1 << 20
"""Seconds until a server counts as hung, in addition to the time for the data at this rate in bytes/s."""


class NbdReader:
    """Reads an export of an NBD server.

    :param connection: a connected socket.
    :ivar size: size of the export in bytes.
    :raise ImageError: When the server lacks the export, closes the connection, or does not answer.
    """

    def __init__(self, connection: socket.socket, export: str) -> None:
        self._connection = connection
        self._limit(0)
        greeting = self._receive(18)
        if greeting[:16] != nbd.MAGIC + nbd.OPTIONS_MAGIC:
            raise ImageError("the server does not speak NBD")
        name = export.encode()
        flags = struct.pack(">I", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
        self._send(flags + nbd.OPTION.pack(nbd.OPTIONS_MAGIC, nbd.EXPORT_NAME, len(name)) + name)
        self.size: int = struct.unpack(">QH", self._receive(10))[0]
        self._requests = 0

    def read(self, offset: int, length: int) -> bytes:
        """Read *length* bytes at *offset*, or fewer at the end of the export.

        :raise ImageError: When reading fails.
        """
        length = min(length, self.size - offset)
        content = bytearray()
        while len(content) < length:
            content += self._read(offset + len(content), min(length - len(content), nbd.LONGEST_REQUEST))
        return bytes(content)

    def _read(self, offset: int, length: int) -> bytes:
        self._request(nbd.READ, offset, length)
        return self._receive(length)

    def _request(self, command: int, offset: int, length: int, content: bytes = b"") -> None:
        """Send a request and receive the reply, without its data.

        :raise ImageError: When the server fails.
        """
        self._requests += 1
        self._limit(length)
        self._send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, self._requests, offset, length) + content)
        magic, error, number = nbd.REPLY.unpack(self._receive(nbd.REPLY.size))
        if magic != nbd.REPLY_MAGIC or number != self._requests:
            raise ImageError("the NBD server violates the protocol")
        if error == errno.ENOSPC:
            raise ImageError("no space left on device")
        if error:
            done = "read" if command == nbd.READ else "write"
            raise ImageError(f"cannot {done} {length} bytes at {offset}: error {error}")

    def _limit(self, length: int) -> None:
        """Set the deadline of the next exchange, for *length* bytes of data."""
        self._deadline = time.monotonic() + _TIMEOUT + length / _SLOWEST

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def _send(self, content: bytes) -> None:
        try:
            self._connection.settimeout(self._left())
            self._connection.sendall(content)
        except OSError as exc:
            raise ImageError(f"cannot send to the NBD server: {exc}") from exc

    def _receive(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            try:
                self._connection.settimeout(self._left())
                chunk = self._connection.recv(length - len(content))
            except OSError as exc:
                raise ImageError(f"the NBD server does not answer: {exc}") from exc
            if not chunk:
                raise ImageError("the NBD server closed the connection")
            content += chunk
        return bytes(content)


class NbdWriter(NbdReader):
    """Writes to an export of an NBD server."""

    def write(self, offset: int, content: bytes) -> None:
        """Write whole sectors, at most 32 MiB, at *offset*; zeros take no room in a qcow2 image.

        :raise ImageError: When writing fails, e.g. because there is no room.
        """
        if content.count(0) == len(content):
            self._request(nbd.WRITE_ZEROES, offset, len(content))
        else:
            self._request(nbd.WRITE, offset, len(content), content)

    def flush(self) -> None:
        """Make all completed writes durable.

        :raise ImageError: When the server fails.
        """
        self._request(nbd.FLUSH, 0, 0)
