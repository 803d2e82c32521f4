"""Signatures of encrypted volumes.

A volume is reported only if its own tools would recognise the header: in addition to the magic bytes, all
fields checked by the tools are checked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from uuid import UUID

from virt_sse.in_guest.partitions import Read
from virt_sse.model.content import EncryptionKind

_LUKS = b"LUKS\xba\xbe"
_LUKS_SECONDARY = b"SKUL\xba\xbe"
_LUKS2_SECONDARY_OFFSETS = tuple(0x4000 << step for step in range(9))
_LUKS2_CHECKSUM = slice(448, 512)

_FVE = b"-FVE-FS-"
_FVE_VISTA, _FVE_SEVEN = b"\xeb\x52\x90" + _FVE, b"\xeb\x58\x90" + _FVE
_FVE_TO_GO = b"\xeb\x58\x90MSWIN4.1"
_FVE_IDENTIFIERS = frozenset(
    UUID(text).bytes_le
    for text in ("4967d63b-2e29-4ad8-8399-f6a339e3d001", "92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8")
)
_FVE_TO_GO_IDENTIFIER = slice(424, 440)

_EXT_MAGIC, _EXT_ENCRYPT = 0xEF53, 0x10000


def kinds(read: Read) -> list[EncryptionKind]:
    """The encryption schemes of the volume read by *read*; usually none or a single scheme."""
    start = read(0, 2048)
    return [*_luks(read, start), *_bitlocker(start), *_filevault(start), *_ext4(start)]


def _luks(read: Read, start: bytes) -> Iterator[EncryptionKind]:
    """Detect LUKS (LUKS1 On-Disk Format Specification 1.2.3, LUKS2 On-Disk Format Specification 1.1.3 §2.1).

    If the primary header is missing, the secondary LUKS2 header counts, as for cryptsetup.
    """
    if start.startswith(_LUKS):
        version = int.from_bytes(start[6:8], "big")
        if version == 1:
            yield EncryptionKind.LUKS1
        elif version == 2:
            yield EncryptionKind.LUKS2
        return
    for offset in _LUKS2_SECONDARY_OFFSETS:
        if _is_secondary_luks2(read, offset):
            yield EncryptionKind.LUKS2
            return


def _is_secondary_luks2(read: Read, offset: int) -> bool:
    """Whether an intact secondary header is at *offset*. A new file system may have overwritten a part."""
    binary = read(offset, 512)
    if len(binary) < 512 or not binary.startswith(_LUKS_SECONDARY):
        return False
    version, header_size = struct.unpack_from(">HQ", binary, 6)
    algorithm = binary[72:104].rstrip(b"\0")
    (own_offset,) = struct.unpack_from(">Q", binary, 256)
    if (version, header_size, own_offset, algorithm) != (2, offset, offset, b"sha256"):
        return False
    header = bytearray(read(offset, header_size))
    checksum = bytes(header[_LUKS2_CHECKSUM])
    header[_LUKS2_CHECKSUM] = bytes(len(checksum))
    return hashlib.sha256(header).digest() == checksum[:32]


def _bitlocker(start: bytes) -> Iterator[EncryptionKind]:
    """Detect BitLocker (BitLocker Drive Encryption format specification (libbde), volume header)."""
    if start.startswith((_FVE_VISTA, _FVE_SEVEN)):
        yield EncryptionKind.BITLOCKER
    elif start.startswith(_FVE_TO_GO) and start[_FVE_TO_GO_IDENTIFIER] in _FVE_IDENTIFIERS:
        yield EncryptionKind.BITLOCKER_TO_GO


def _filevault(start: bytes) -> Iterator[EncryptionKind]:
    """Detect FileVault (FileVault Drive Encryption format (libfvde), volume header) by libblkid's rules."""
    if len(start) < 512 or start[88:90] != b"CS":
        return
    checksum, seed, version, block_type = struct.unpack_from("<IIHH", start)
    (algorithm,) = struct.unpack_from("<I", start, 90)
    key_size, method = struct.unpack_from("<II", start, 168)
    encrypted = (version, block_type, algorithm, key_size, method) == (1, 0x10, 1, 16, 2)
    if encrypted and _crc32c(seed, start[8:512]) == checksum:
        yield EncryptionKind.FILEVAULT


def _crc32c(value: int, data: bytes) -> int:
    """CRC-32C without a final inversion."""
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


def _ext4(start: bytes) -> Iterator[EncryptionKind]:
    """Detect ext4 encryption in the superblock (Linux, Documentation/filesystems/ext4/super.rst)."""
    if len(start) >= 2048:
        (magic,) = struct.unpack_from("<H", start, 1024 + 0x38)
        (incompatible,) = struct.unpack_from("<I", start, 1024 + 0x60)
        if magic == _EXT_MAGIC and incompatible & _EXT_ENCRYPT:
            yield EncryptionKind.EXT4_ENCRYPT
