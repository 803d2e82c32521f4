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
from virt_sse.model.ciphers import KNOWN, Cipher
from virt_sse.model.keys import Dek
from virt_sse.system.tools import run

SECTOR = 512
HEADER_END = 592
"""End of the header's fields; the gap up to the first keyslot at 4096 is unused by LUKS tools."""
FIRST_KEYSLOT = 4096

MAGIC = b"LUKS\xba\xbe"
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_KEYSLOT = struct.Struct(">II32sII")
_CIPHER_NAME, _VOLUME_KEY_BYTES = 8, 108
_KEYSLOTS = 8
_KEYSLOT_ACTIVE, _KEYSLOT_INACTIVE = 0x00AC71F3, 0x0000DEAD
_STRIPES = 4000
_HASH = "sha256"
"""The hash of all headers made by cryptsetup and QEMU for virt-sse."""

_PBKDF2_ITERATIONS = 1000
"""cryptsetup's minimum: 256 random bits cannot be guessed, however fast a guess is."""
_MAX_ITERATIONS = 500_000
"""Upper bound for all iterations to open a volume, about 0.2 s.

cryptsetup writes 1000 per count. qemu-img, used for the ciphers that cryptsetup lacks, measures the machine
and writes counts for 10 ms: about 50,000 on a fast processor. The bound is ten times these counts.
"""
_ALIGNMENT = 4096
"""Alignment of the payload by QEMU and ``cryptsetup --align-payload 8``."""
_ROOM = 4 << 20
"""Upper bound for a LUKS1 header with 8 keyslots of 64-byte keys."""


_CIPHERS = {(cipher.cryptsetup, cipher.volume_key_bits): cipher for cipher in KNOWN}


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

    cipher: Cipher
    payload_offset: int
    volume_key_bytes: int
    keyslots: tuple[Keyslot, ...]

    @classmethod
    def parse(cls, header: bytes) -> Self:
        """Parse and validate the first :data:`HEADER_END` bytes of a LUKS1 volume.

        QEMU itself accepts any payload offset and any number of iterations. Here, the gap between
        header and keyslots is required, for the envelope, a gap between keyslots and payload is refused, and
        so are ciphers, hashes and iterations that virt-sse never writes.

        :raise ImageFormatError: When there is no LUKS1 header, or the header is damaged or unusual.
        """
        if len(header) < HEADER_END or not header.startswith(MAGIC):
            raise ImageFormatError("no LUKS header")
        fields = _HEADER.unpack_from(header)
        if fields[1] != 1:
            raise ImageFormatError(f"LUKS version {fields[1]}, not 1")
        keyslots = []
        most_iterations, total = fields[9], 0
        for index in range(_KEYSLOTS):
            state, iterations, _, offset, stripes = _KEYSLOT.unpack_from(
                header, _HEADER.size + index * _KEYSLOT.size
            )
            most_iterations = max(most_iterations, iterations)
            if state == _KEYSLOT_ACTIVE:
                total += iterations + fields[9]
            elif state != _KEYSLOT_INACTIVE:
                raise ImageFormatError("a LUKS header with a damaged keyslot")
            keyslots.append(Keyslot(state == _KEYSLOT_ACTIVE, offset * SECTOR, stripes))
        if max(most_iterations, total) > _MAX_ITERATIONS:
            most = most_iterations if most_iterations > _MAX_ITERATIONS else total
            raise ImageFormatError(f"a LUKS header with {most} iterations: too slow to open")
        hash_name = _text(fields[4])
        if hash_name != _HASH:
            raise ImageFormatError(f"a LUKS header with the hash {hash_name!r}, not {_HASH}")
        payload_offset = fields[5] * SECTOR
        volume_key_bytes = fields[6]
        end = max(slot.offset + volume_key_bytes * slot.stripes for slot in keyslots)
        if (
            min(slot.offset for slot in keyslots) < FIRST_KEYSLOT
            or payload_offset != -(-end // _ALIGNMENT) * _ALIGNMENT
            or payload_offset > _ROOM
        ):
            raise ImageFormatError("a LUKS header with keyslots or payload at unexpected offsets")
        if any(slot.stripes != _STRIPES for slot in keyslots):
            raise ImageFormatError("a LUKS header with an unexpected number of stripes")
        name = f"{_text(fields[2])}-{_text(fields[3])}"
        cipher = _CIPHERS.get((name, volume_key_bytes * 8))
        if cipher is None:
            raise ImageFormatError(
                f"a LUKS header with the cipher {name!r} and a key of {volume_key_bytes} bytes"
            )
        return cls(
            cipher=cipher,
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
            confinement=None,  # the file in memory is this process's own
            stdin=dek.passphrase,
            pass_fds=[memory],
        )
        header = Luks1Header.parse(os.pread(memory, HEADER_END, 0))
        return os.pread(memory, header.payload_offset, 0)
    finally:
        os.close(memory)
