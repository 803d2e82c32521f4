"""The encrypted file of a saved state: a header, then chunks of libvirt's memory image.

The file, integers big-endian::

    16  magic
    4   length of the header, at most 64 KiB
    …   header, JSON (:class:`StateHeader`)
    …   chunks: a megabyte of the memory image each, the last one shorter or empty; 16 bytes of tag each

Each chunk is encrypted with AES-256-GCM. Its nonce is the chunk's number, 11 bytes, and a byte that is 1 in
the last chunk only: a chunk moved, left out or added is found, and so is a cut-off file. The key is derived
with HKDF-SHA256 from all DEKs of the file and from the header: a changed header opens no chunk. The scheme is
STREAM (Hoang, Reyhanitabar, Rogaway, Vizár 2015), as in age.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Self

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from virt_sse.errors import ImageFormatError
from virt_sse.model.keys import Dek, KeyId, WrappedDek
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import write_at

MAGIC = b"virt-sse state 1"
CHUNK = 1 << 20
_TAG = 16
_MOST_HEADER = 64 << 10
_PURPOSE = b"virt-sse saved state v1"


class StateDek(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wrapped DEK of the file.

    :ivar key: provider, name and version of the KEK.
    :ivar set: id of the encryption set whose identity may use the KEK; ``None`` for the host's own.
    """

    key: tuple[str, str, str]
    alg: str
    dek: bytes
    set: str | None = None

    @classmethod
    def of(cls, wrapped: WrappedDek, set_id: str | None) -> Self:
        """Store *wrapped* for the file's header."""
        key = wrapped.key
        return cls((key.provider, key.name, key.version), wrapped.algorithm, wrapped.ciphertext, set_id)

    @property
    def wrapped(self) -> WrappedDek:
        """The DEK as key providers take it."""
        return WrappedDek(self.dek, self.alg, KeyId(*self.key))


class StateHeader(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The header of a saved state.

    :ivar id: UUID of this saved state; the DEKs are bound to it.
    :ivar domain: UUID of the domain.
    :ivar created: time of the save, ISO 8601.
    :ivar is_running: whether the guest ran, and runs on once restored.
    """

    id: str
    domain: str
    name: str
    created: str
    is_running: bool
    deks: tuple[StateDek, ...]


class StateWriter:
    """Encrypts a memory image into an open, empty file.

    :param deks: the DEKs in the header, unwrapped, in the same order.
    :raise OSError: When the file cannot be written, by every method.
    """

    def __init__(self, descriptor: int, header: StateHeader, deks: Sequence[Dek]) -> None:
        encoded = msgspec.json.encode(header)
        self._descriptor = descriptor
        self._cipher = _cipher(encoded, deks)
        self._number = self._offset = 0
        self._rest = bytearray()
        self._append(MAGIC + len(encoded).to_bytes(4, "big") + encoded)

    def write(self, content: bytes) -> None:
        """Add *content*. Whole chunks are written only when more content follows."""
        self._rest += content
        while len(self._rest) > CHUNK:
            self._append_chunk(bytes(self._rest[:CHUNK]), is_last=False)
            del self._rest[:CHUNK]

    def finish(self) -> None:
        """Write the last chunk: without it the file counts as cut off."""
        self._append_chunk(bytes(self._rest), is_last=True)
        self._rest.clear()

    def _append_chunk(self, content: bytes, *, is_last: bool) -> None:
        self._append(self._cipher.encrypt(_nonce(self._number, is_last=is_last), content, None))
        self._number += 1

    def _append(self, content: bytes) -> None:
        write_at(self._descriptor, content, self._offset)
        self._offset += len(content)


def read_header(file: BinaryIO) -> tuple[StateHeader, bytes]:
    """Read the header at the beginning of a saved state; proves nothing before a chunk is read.

    :return: the header, parsed and as bytes.
    :raise ImageFormatError: When the file is no saved state.
    """
    start = file.read(len(MAGIC) + 4)
    length = int.from_bytes(start[len(MAGIC) :], "big")
    if not start.startswith(MAGIC) or len(start) != len(MAGIC) + 4 or length > _MOST_HEADER:
        raise ImageFormatError(f"{file.name} is no saved state of virt-sse")
    encoded = file.read(length)
    try:
        return from_json(encoded, StateHeader), encoded
    except DocumentError as exc:
        raise ImageFormatError(f"{file.name} is no saved state of virt-sse: {exc}") from exc


def read_chunks(file: BinaryIO, header: bytes, deks: Sequence[Dek]) -> Iterator[bytes]:
    """Decrypt the chunks after the header, each authenticated before it is handed out.

    :param header: as read by :func:`read_header`.
    :raise ImageFormatError: When a chunk is damaged, moved or missing, or the file is cut off.
    """
    cipher = _cipher(header, deks)
    left = os.fstat(file.fileno()).st_size - file.tell()
    number = 0
    while True:
        content = file.read(CHUNK + _TAG)
        left -= len(content)
        try:
            yield cipher.decrypt(_nonce(number, is_last=left <= 0), content, None)
        except (InvalidTag, ValueError) as exc:
            raise ImageFormatError(f"the saved state {file.name} is damaged or cut off") from exc
        if left <= 0:
            return
        number += 1


def _cipher(header: bytes, deks: Sequence[Dek]) -> AESGCM:
    material = b"".join(dek.material for dek in deks)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(header)
    derived = HKDF(hashes.SHA256(), 32, salt=digest.finalize(), info=_PURPOSE).derive(material)
    return AESGCM(derived)


def _nonce(number: int, *, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])
