"""LUKS1 headers: made by cryptsetup, read and erased here.

Source: LUKS1 On-Disk Format Specification 1.2.3. All sizes and offsets here are in bytes, counted from the
start of the header.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import ImageFormatError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.keys import Dek
from virt_sse.system.tools import run

SECTOR = 512
HEADER_END = 592
"""Where the header's fields end; nothing is written from here to the first keyslot at 4096."""
FIRST_KEYSLOT = 4096

_MAGIC = b"LUKS\xba\xbe"
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_KEYSLOT = struct.Struct(">II32sII")
_CIPHER_NAME, _VOLUME_KEY_BYTES = 8, 108
_KEYSLOTS = 8
_KEYSLOT_ACTIVE = 0x00AC71F3

_PBKDF2_ITERATIONS = 1000
"""The least that cryptsetup takes: a DEK of 256 random bits cannot be guessed, however fast a guess is."""
_MAX_ITERATIONS = 20_000_000
"""About ten seconds; far more than we or QEMU's formatter choose."""
_ALIGNMENT = 4096
"""Of the payload, as QEMU and ``cryptsetup --align-payload 8`` make it."""
_ROOM = 4 << 20
"""More than any LUKS1 header with 8 keyslots of 64-byte keys needs."""


@dataclass(frozen=True, slots=True)
class Keyslot:
    """One of the eight keyslots.

    :ivar stripes: by how much the anti-forensic splitter inflates the volume key.
    """

    active: bool
    offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class Luks1Header:
    """The fields of a LUKS1 header that matter here.

    :ivar payload_offset: where the encrypted data begins in a raw image; the length of all that comes before.
    """

    cipher_name: str
    cipher_mode: str
    payload_offset: int
    volume_key_bytes: int
    keyslots: tuple[Keyslot, ...]

    @classmethod
    def parse(cls, header: bytes) -> Self:
        """Read the first :data:`HEADER_END` bytes of a LUKS1 volume.

        :raise ImageFormatError: When they are no LUKS1 header, or a damaged one, as far as that can be told
            without a key and QEMU would not tell: it takes any payload offset, and any number of iterations.
            And when there is no gap between it and its keyslots, or any behind them.
        """
        if len(header) < HEADER_END or not header.startswith(_MAGIC):
            raise ImageFormatError("no LUKS header")
        fields = _HEADER.unpack_from(header)
        if fields[1] != 1:
            raise ImageFormatError(f"LUKS version {fields[1]}, not 1")
        keyslots = []
        most_iterations = fields[9]
        for index in range(_KEYSLOTS):
            state, iterations, _, offset, stripes = _KEYSLOT.unpack_from(
                header, _HEADER.size + index * _KEYSLOT.size
            )
            most_iterations = max(most_iterations, iterations)
            keyslots.append(Keyslot(state == _KEYSLOT_ACTIVE, offset * SECTOR, stripes))
        if most_iterations > _MAX_ITERATIONS:
            raise ImageFormatError(f"a LUKS header that takes {most_iterations} iterations to open")
        payload_offset = fields[5] * SECTOR
        volume_key_bytes = fields[6]
        end = max(slot.offset + volume_key_bytes * slot.stripes for slot in keyslots)
        if (
            min(slot.offset for slot in keyslots) < FIRST_KEYSLOT
            or payload_offset != -(-end // _ALIGNMENT) * _ALIGNMENT
            or payload_offset > _ROOM
        ):
            raise ImageFormatError("a LUKS header with its keyslots in unusual places")
        return cls(
            cipher_name=_text(fields[2]),
            cipher_mode=_text(fields[3]),
            payload_offset=payload_offset,
            volume_key_bytes=volume_key_bytes,
            keyslots=tuple(keyslots),
        )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", errors="replace")


def set_cipher(header: bytearray, cipher: Cipher) -> None:
    """Make *header* say that it is of *cipher*. Its keyslots, encrypted with another, then open no more."""
    name, _, mode = cipher.cryptsetup.partition("-")
    struct.pack_into("32s32s", header, _CIPHER_NAME, name.encode(), mode.encode())
    struct.pack_into(">I", header, _VOLUME_KEY_BYTES, cipher.volume_key_bits // 8)


def make_header(cipher: Cipher, dek: Dek) -> bytes:
    """A LUKS1 header with a fresh random volume key in keyslot 0, which *dek* unlocks; up to the payload.

    cryptsetup writes it into anonymous memory, and takes the passphrase from a pipe.

    :raise ToolError: When cryptsetup is missing, fails, or lacks the cipher (it needs the kernel's crypto
        for all but aes).
    """
    memory = os.memfd_create("luks-header", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, _ROOM)
        run(
            ["cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--use-urandom"]
            + ["--cipher", cipher.cryptsetup, "--key-size", str(cipher.volume_key_bits), "--hash", "sha256"]
            + ["--pbkdf-force-iterations", str(_PBKDF2_ITERATIONS), "--align-payload", "8"]
            + ["--key-file", "-", f"/proc/self/fd/{memory}"],
            stdin=dek.passphrase,
            pass_fds=[memory],
        )
        header = Luks1Header.parse(os.pread(memory, HEADER_END, 0))
        return os.pread(memory, header.payload_offset, 0)
    finally:
        os.close(memory)
