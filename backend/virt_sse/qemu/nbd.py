"""Reading from an NBD server (NBD ``doc/proto.md``): the fixed newstyle handshake, and simple replies."""

from __future__ import annotations

import socket
import struct

from virt_sse.errors import ImageError

_TIMEOUT = 30.0
"""Seconds in which storage answers unless it hangs."""
_MOST_AT_ONCE = 32 << 20
"""The most that a server has to serve in one request."""

_MAGIC, _OPTIONS_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME = 1
_READ = 0
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_REPLY = struct.Struct(">IIQ")
_REPLY_MAGIC = 0x67446698


class NbdReader:
    """What a server exports, over a connection to it.

    :ivar size: in bytes.
    :raise ImageError: When the server has no such export, is gone, or does not answer.
    """

    def __init__(self, connection: socket.socket, export: str) -> None:
        self._connection = connection
        connection.settimeout(_TIMEOUT)
        greeting = self._receive(18)
        if greeting[:16] != _MAGIC + _OPTIONS_MAGIC:
            raise ImageError("what answers is no NBD server")
        name = export.encode()
        flags = struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES)
        self._send(flags + _OPTIONS_MAGIC + struct.pack(">II", _EXPORT_NAME, len(name)) + name)
        self.size: int = struct.unpack(">QH", self._receive(10))[0]
        self._requests = 0

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset* on, or fewer where the data ends.

        :raise ImageError: When they cannot be read.
        """
        length = min(length, self.size - offset)
        content = bytearray()
        while len(content) < length:
            content += self._read(offset + len(content), min(length - len(content), _MOST_AT_ONCE))
        return bytes(content)

    def _read(self, offset: int, length: int) -> bytes:
        self._requests += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, _READ, self._requests, offset, length))
        magic, error, number = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or number != self._requests:
            raise ImageError("the NBD server does not keep to the protocol")
        if error:
            raise ImageError(f"cannot read {length} bytes at {offset}: error {error}")
        return self._receive(length)

    def _send(self, content: bytes) -> None:
        try:
            self._connection.sendall(content)
        except OSError as exc:
            raise ImageError(f"the NBD server does not listen: {exc}") from exc

    def _receive(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            try:
                chunk = self._connection.recv(length - len(content))
            except OSError as exc:
                raise ImageError(f"the NBD server does not answer: {exc}") from exc
            if not chunk:
                raise ImageError("the NBD server has hung up")
            content += chunk
        return bytes(content)
