"""Messages between the process of a PKCS#11 module and its caller: MessagePack frames of fixed types.

The caller does not trust the module's process: a frame is decoded into the one type that the caller expects,
with limits on length, and names no code. A frame is its length (4 bytes, big-endian) and its content. In
order:

1. Caller: a call, ``[seconds, function, arguments]``. *function* is ``module:qualified.name``.
2. Process: :class:`PinWanted`, any number of times. Each time, the caller sends the PIN as the whole content
   of a frame, and the process sends the :class:`~virt_sse.pkcs11.pins.PinOutcome`.
3. Process: :class:`Returned` or :class:`Refused`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import os
import socket
import struct
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from virt_sse import errors
from virt_sse.errors import InvalidValueError, KeyProviderUnavailableError, VirtSseError
from virt_sse.pkcs11.pins import PinOutcome

T = TypeVar("T")

LONGEST = 16 << 20
"""Maximum length of a frame in bytes: about 20,000 keys."""

_LENGTH = struct.Struct("!I")
_PIECE = 1 << 16
_LONGEST_MESSAGE = 2000

_ERRORS: dict[str, type[VirtSseError]] = {
    each.__name__: each
    for each in (
        errors.ConfigError,
        errors.InvalidValueError,
        errors.KeyProviderError,
        errors.KeyNotFoundError,
        errors.KeyDisabledError,
        errors.KeyDeniedError,
        errors.KeyOperationUnsupportedError,
        errors.KeyProviderUnavailableError,
        errors.UnwrapError,
    )
}
"""The errors that a module's process may raise in its caller."""


class MessageError(ValueError):
    """A frame is too long or not of the expected type. The message shows no content."""


class Returned(msgspec.Struct, frozen=True, tag=True):
    """The call's result, encoded."""

    value: msgspec.Raw

    def __repr__(self) -> str:  # may be a secret
        return "Returned()"


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The call raised an error.

    :ivar kind: name of the error's class.
    """

    kind: str
    message: str
    hint: str | None

    @classmethod
    def of(cls, error: VirtSseError) -> Refused:
        """Describe an error; a class that may not pass is replaced by its nearest base that may."""
        kinds = [each.__name__ for each in type(error).__mro__ if _ERRORS.get(each.__name__) is each]
        kind = kinds[0] if kinds else KeyProviderUnavailableError.__name__
        return cls(kind, _printable(str(error)), None if error.hint is None else _printable(error.hint))

    def error(self) -> VirtSseError:
        """The error, for the caller to raise. Control characters are replaced: terminals show the message.

        :raise MessageError: When the class may not pass.
        """
        kind = _ERRORS.get(self.kind)
        if kind is None:
            raise MessageError("unknown error")
        return kind(_printable(self.message), hint=None if self.hint is None else _printable(self.hint))


class PinWanted(msgspec.Struct, frozen=True, tag=True):
    """Asks the caller for the PIN.

    :ivar is_last: whether the token would lock itself after one more wrong PIN.
    """

    is_last: bool


ANSWERS: msgspec.msgpack.Decoder[Returned | Refused | PinWanted] = msgspec.msgpack.Decoder(
    Returned | Refused | PinWanted
)
"""Decoder of the messages that a call may wait for; see :func:`decode`."""

NOTHING = msgspec.msgpack.Decoder(type(None))
"""Decoder of the result of making an object, which stays in the module's process."""

OUTCOMES = msgspec.msgpack.Decoder(PinOutcome)
"""Decoder of the message after a PIN; see :func:`decode`."""


class Channel:
    """Sends and receives frames over a connected socket. Deadlines are in :func:`time.monotonic`'s seconds.

    Both directions raise :class:`ConnectionError` or :class:`EOFError` when the peer has gone, and
    :class:`TimeoutError` after the deadline.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, content: bytes, deadline: float | None = None) -> None:
        """Send a frame."""
        self._limit(deadline)
        self._connection.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self, deadline: float | None = None) -> bytes:
        """Receive a frame.

        :raise MessageError: When the frame is too long.
        """
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        if length > LONGEST:
            raise MessageError(f"frame of {length} bytes")
        return self._exactly(length, deadline)

    def close(self) -> None:
        """Close the socket: the peer's next :meth:`receive` raises :class:`EOFError`."""
        self._connection.close()

    def _exactly(self, length: int, deadline: float | None) -> bytes:
        content = bytearray()
        while len(content) < length:  # memory grows with the content, not with the announced length
            self._limit(deadline)
            piece = self._connection.recv(min(length - len(content), _PIECE))
            if not piece:
                raise EOFError
            content += piece
        return bytes(content)

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)


def call_frame(seconds: float, work: Callable[..., object], arguments: tuple[object, ...]) -> bytes:
    """A call of *work*, a function or class at the top of its module or class.

    :raise InvalidValueError: When an argument has no encoding: text that is not Unicode, a number too large.
    """
    name = f"{work.__module__}:{work.__qualname__}"
    try:
        return msgspec.msgpack.encode((seconds, name, arguments), enc_hook=_encoded_path)
    except (OverflowError, UnicodeEncodeError) as exc:
        raise InvalidValueError("text or number invalid for a PKCS#11 module") from exc


def read_call(content: bytes) -> tuple[float, Callable[..., Any], list[object]]:
    """Decode a call: time limit in seconds, function, and arguments of the types that the function names.

    For the module's process only, which trusts its caller.
    """
    seconds, name, arguments = msgspec.msgpack.decode(content, type=tuple[float, str, list[msgspec.Raw]])
    module, _, path = name.partition(":")
    work = operator.attrgetter(path)(importlib.import_module(module))
    decoders = _argument_decoders(work)[: len(arguments)]
    return seconds, work, [each.decode(raw) for each, raw in zip(decoders, arguments, strict=True)]


def returned_frame(value: object) -> bytes:
    """The answer of a call that returned *value*; a refusal when *value* is too long."""
    frame = msgspec.msgpack.encode(Returned(msgspec.Raw(msgspec.msgpack.encode(value))))
    if len(frame) > LONGEST:
        return refused_frame(KeyProviderUnavailableError("the token's answer is too long"))
    return frame


def refused_frame(error: VirtSseError) -> bytes:
    """The answer of a call that raised *error*."""
    return msgspec.msgpack.encode(Refused.of(error))


def encode(message: PinWanted | PinOutcome) -> bytes:
    """Encode any other message of the module's process."""
    return msgspec.msgpack.encode(message)


@functools.cache
def result_decoder(work: Callable[..., object]) -> msgspec.msgpack.Decoder[Any]:
    """Decoder of the results of *work*, from its annotations; see :func:`decode`."""
    return msgspec.msgpack.Decoder(typing.get_type_hints(work)["return"])


def decode(content: bytes | msgspec.Raw, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Decode a message from the module's process.

    :raise MessageError: When *content* is malformed, or not of the decoder's type.
    """
    try:
        return decoder.decode(content)
    except (ValueError, OverflowError, RecursionError) as exc:  # MsgspecError and UnicodeError among them
        raise MessageError("unexpected type or malformed content") from exc


@functools.cache
def _argument_decoders(work: Callable[..., object]) -> list[msgspec.msgpack.Decoder[Any]]:
    """Decoders of the arguments after the first, from the annotations of *work*."""
    names = list(inspect.signature(work).parameters)[1:]
    hints = typing.get_type_hints(getattr(work, "__init__") if isinstance(work, type) else work)  # noqa: B009 -- mypy
    return [msgspec.msgpack.Decoder(hints[name], dec_hook=_decoded_path) for name in names]


def _encoded_path(value: object) -> bytes:
    if isinstance(value, Path):
        return os.fsencode(value)
    raise NotImplementedError(f"a {type(value).__name__} has no encoding")


def _decoded_path(kind: type, value: object) -> Path:
    if kind is Path and isinstance(value, bytes):
        return Path(os.fsdecode(value))
    raise NotImplementedError(f"a {kind.__name__} has no encoding")


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text[:_LONGEST_MESSAGE])
