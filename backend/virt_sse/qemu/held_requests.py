"""NBD server that holds requests until they may be passed on to another export (NBD ``doc/proto.md``).

Part of the script :mod:`~virt_sse.stages.hand_over`. The client and the other export
belong to the disk's own storage daemon.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from errno import EIO
from io import BufferedReader

from virt_sse.qemu import nbd_protocol as nbd
from virt_sse.qemu.nbd import NbdReader

_REPLY_TO_OPTION = 0x3E889045565A9
_ABORT, _INFO, _GO = 2, 6, 7
_ACK, _ABOUT_EXPORT, _UNSUPPORTED = 1, 3, (1 << 31) + 1
_FLAGS = 1 | 4 | 8 | 32 | 64
"""Of the export: it has flags, and knows flush, FUA, trim and writes of zeros."""
_ANSWER, _EXPORT = struct.Struct(">QIII"), struct.Struct(">HQH")
_LONGEST_OPTION = 1 << 16

HELD_SECONDS = 60.0
"""A request held for this time fails: QEMU pauses the guest, and sends the request again when it goes on.

Without a limit, QEMU's monitor would hang for as long when ``cont`` reads metadata of a qcow2 volume.
"""


class ProtocolError(Exception):
    """A violation of the NBD protocol; the connection is closed."""


class HeldRequests:
    """Serves an export whose requests wait, up to :data:`HELD_SECONDS`, or are passed on.

    :param listening: the socket at which the client connects.
    :param size: of the export in bytes.
    :param arrived: set by the first held request for data. A flush is held until the image is closed: no
        write of the client is unflushed then.
    """

    def __init__(self, listening: socket.socket, size: int, arrived: threading.Event) -> None:
        self._listening = listening
        self._size = size
        self._changed = threading.Condition()
        self._is_passing = self._is_closed = False
        self._exchange = threading.Lock()
        self._target: tuple[socket.socket, BufferedReader] | None = None
        self._arrived = arrived

    def start(self) -> None:
        """Serve in threads of their own, until the process ends."""
        threading.Thread(target=self._accept, daemon=True).start()

    def pass_on(self, socket_path: str, export: str) -> None:
        """Pass all requests on to an export, the held ones as well.

        :raise OSError: When there is no server.
        :raise ImageError: When the server lacks the export, or does not answer.
        """
        server = socket.socket(socket.AF_UNIX)
        server.connect(socket_path)
        NbdReader(server, export)
        server.settimeout(None)
        answers = server.makefile("rb")
        self._target = server, answers
        with self._changed:
            self._is_passing = True
            self._changed.notify_all()

    def note_closed(self) -> None:
        """Note that the image is closed, and so nothing is unflushed: held flushes are answered."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def hold(self) -> None:
        """Hold all requests from now on; a request that is being passed on is completed first."""
        with self._changed:
            self._is_passing = False
        with self._exchange:
            if self._target:
                server, answers = self._target
                answers.close()
                server.close()
                self._target = None

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the socket is closed
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as requests, contextlib.suppress(OSError, ProtocolError):
            if self._negotiate(client, requests):
                while self._answer(client, requests):
                    pass

    def _negotiate(self, client: socket.socket, options: BufferedReader) -> bool:
        """Whether the client takes the export."""
        client.sendall(nbd.MAGIC + nbd.OPTIONS_MAGIC + struct.pack(">H", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES))
        _receive(options, 4)
        while True:
            _, option, length = nbd.OPTION.unpack(_receive(options, nbd.OPTION.size))
            if length > _LONGEST_OPTION:
                raise ProtocolError
            _receive(options, length)
            answers = [(_UNSUPPORTED, b"")]
            if option in (_INFO, _GO):
                answers = [(_ABOUT_EXPORT, _EXPORT.pack(0, self._size, _FLAGS)), (_ACK, b"")]
            elif option == _ABORT:
                answers = [(_ACK, b"")]
            for kind, content in answers:
                client.sendall(_ANSWER.pack(_REPLY_TO_OPTION, option, kind, len(content)) + content)
            if option in (_GO, _ABORT):
                return bool(option == _GO)

    def _answer(self, client: socket.socket, requests: BufferedReader) -> bool:
        """Answer the next request; whether more may follow."""
        header = _receive(requests, nbd.REQUEST.size)
        magic, _, command, handle, _, length = nbd.REQUEST.unpack(header)
        if magic != nbd.REQUEST_MAGIC or (command in (nbd.READ, nbd.WRITE) and length > nbd.LONGEST_REQUEST):
            raise ProtocolError
        if command == nbd.DISCONNECT:
            return False
        content = _receive(requests, length) if command == nbd.WRITE else b""
        while True:
            with self._changed:
                if command != nbd.FLUSH and not self._is_passing:
                    self._arrived.set()
                is_in_time = self._changed.wait_for(
                    lambda: self._is_passing or (command == nbd.FLUSH and self._is_closed), HELD_SECONDS
                )
                is_passing = self._is_passing
            if not is_passing:
                client.sendall(nbd.REPLY.pack(nbd.REPLY_MAGIC, 0 if is_in_time else EIO, handle))
                return True
            with self._exchange:
                if self._target:
                    wanted = length if command == nbd.READ else 0
                    client.sendall(_exchange(self._target, header + content, wanted))
                    return True


def _exchange(target: tuple[socket.socket, BufferedReader], request: bytes, wanted: int) -> bytes:
    """The answer to a request, with *wanted* bytes of data."""
    server, answers = target
    server.sendall(request)
    reply = _receive(answers, nbd.REPLY.size)
    _, error, _ = nbd.REPLY.unpack(reply)
    return reply if error else reply + _receive(answers, wanted)


def _receive(stream: BufferedReader, length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise ProtocolError
    return content
