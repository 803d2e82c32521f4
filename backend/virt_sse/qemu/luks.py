"""LUKS1 headers: parsing, and creation with cryptsetup.

Source: LUKS1 On-Disk Format Specification 1.2.3. All sizes and offsets are in bytes, from the start of the
header.
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
"""End of the header's fields; the gap up to the first keyslot at 4096 is unused by LUKS tools."""
FIRST_KEYSLOT = 4096

_MAGIC = b"LUKS\xba\xbe"
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_KEYSLOT = struct.Struct(">II32sII")
_CIPHER_NAME, _VOLUME_KEY_BYTES = 8, 108
_KEYSLOTS = 8
_KEYSLOT_ACTIVE = 0x00AC71F3

_PBKDF2_ITERATIONS = 1000
"""cryptsetup's minimum: 256 random bits cannot be guessed, however fast a guess is."""
_MAX_ITERATIONS = 20_000_000
"""About ten seconds; far above the choices of virt-sse and QEMU."""
_ALIGNMENT = 4096
"""Alignment of the payload by QEMU and ``cryptsetup --align-payload 8``."""
_ROOM = 4 << 20
"""Upper bound for a LUKS1 header with 8 keyslots of 64-byte keys."""


@dataclass(frozen=True, slots=True)
class Keyslot:
    """A keyslot.

    :ivar stripes: factor by which the anti-forensic splitter inflates the volume key.
    """

    active: bool
    offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class Luks1Header:
    """The relevant fields of a LUKS1 header.

    :ivar payload_offset: start of the encrypted data in a raw image, i.e. length of header and keyslots.
    """

    cipher_name: str
    cipher_mode: str
    payload_offset: int
    volume_key_bytes: int
    keyslots: tuple[Keyslot, ...]

    @classmethod
    def parse(cls, header: bytes) -> Self:
        """Parse and validate the first :data:`HEADER_END` bytes of a LUKS1 volume.

        QEMU itself accepts any payload offset and any number of iterations. Here, the gap between
        header and keyslots is required, for the envelope, and a gap between keyslots and payload is refused.

        :raise ImageFormatError: When there is no LUKS1 header, or the header is damaged or unusual.
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
            raise ImageFormatError(f"a LUKS header with {most_iterations} iterations: too slow to open")
        payload_offset = fields[5] * SECTOR
        volume_key_bytes = fields[6]
        end = max(slot.offset + volume_key_bytes * slot.stripes for slot in keyslots)
        if (
            min(slot.offset for slot in keyslots) < FIRST_KEYSLOT
            or payload_offset != -(-end // _ALIGNMENT) * _ALIGNMENT
            or payload_offset > _ROOM
        ):
            raise ImageFormatError("a LUKS header with keyslots or payload at unexpected offsets")
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
    """Overwrite the cipher in *header* by *cipher*; the keyslots become unusable if the cipher differs."""
    name, _, mode = cipher.cryptsetup.partition("-")
    struct.pack_into("32s32s", header, _CIPHER_NAME, name.encode(), mode.encode())
    struct.pack_into(">I", header, _VOLUME_KEY_BYTES, cipher.volume_key_bits // 8)


def make_header(cipher: Cipher, dek: Dek) -> bytes:
    """Make a LUKS1 header, keyslots included, with a new random volume key in keyslot 0, unlocked by *dek*.

    cryptsetup writes the header into anonymous memory and reads the passphrase from a pipe.

    :raise ToolError: When cryptsetup is missing, fails, or lacks the cipher. All ciphers but aes need the
        kernel's crypto.
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
