"""Disks as guests make them: partition tables and volumes, honest and not, byte by byte."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from support.folders import VECTORS
from virt_sse.in_guest.signatures import _crc32c

K, M, G = 1 << 10, 1 << 20, 1 << 30
LVM = json.loads((VECTORS / "lvm.json").read_text())

FVE = UUID("4967d63b-2e29-4ad8-8399-f6a339e3d001")
FVE_USED_SPACE = UUID("92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8")


class GuestDisk:
    """A sparse disk, which counts its reads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = 0
        self._chunks: dict[int, bytearray] = {}

    def write(self, offset: int, content: bytes) -> None:
        while content:
            chunk = self._chunks.setdefault(offset // K, bytearray(K))
            length = min(K - offset % K, len(content))
            chunk[offset % K : offset % K + length] = content[:length]
            offset, content = offset + length, content[length:]

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        self.reads += 1
        end = min(offset + length, self.size)
        found = b"".join(
            bytes(self._chunks.get(number, b"")) or bytes(K) for number in range(offset // K, -(-end // K))
        )
        return found[offset % K :][: max(0, end - offset)]

    def save(self, path: Path) -> Path:
        """Write the disk into the sparse file *path*."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for number, chunk in self._chunks.items():
                file.seek(number * K)
                file.write(chunk[: max(0, self.size - number * K)])
        return path


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """An MBR or EBR; each entry is type, first sector and number of sectors."""
    table = b"".join(struct.pack("<4xB3xII", *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(
    disk: GuestDisk, entries: Sequence[tuple[int, int]], *, sector: int = 512, count: int = 128
) -> tuple[int, int]:
    """Write a GPT with its backup; each entry is first and last sector. The sectors of the two headers."""
    last = disk.size // sector - 1
    table = b"".join(struct.pack("<16s16sQQ", b"t" * 16, b"u" * 16, *entry) + bytes(80) for entry in entries)
    table = table.ljust(count * 128, b"\0")
    length = -(-len(table) // sector)
    for own, other, at in ((1, last, 2), (last, 1, last - length)):
        disk.write(at * sector, table)
        disk.write(own * sector, gpt_header(own, other, at, count, 128, zlib.crc32(table)))
    disk.write(0, mbr((0xEE, 1, min(last, 0xFFFFFFFF))))
    return 1, last


def gpt_header(own: int, other: int, table: int, count: int, entry_size: int, crc: int) -> bytes:
    def packed(own_crc: int) -> bytes:
        return struct.pack(
            "<8s4sIII QQQQ 16s QIII",
            *(b"EFI PART", b"\0\0\1\0", 92, own_crc, 0, own, other, 34, other, b"d" * 16),
            *(table, count, entry_size, crc),
        )

    return packed(zlib.crc32(packed(0)))


LUKS1 = b"LUKS\xba\xbe\0\1" + b"aes".ljust(32, b"\0") + b"xts-plain64".ljust(32, b"\0")
LUKS2 = b"LUKS\xba\xbe\0\2" + struct.pack(">Q", 16 * K)
BITLOCKER_VISTA = (b"\xeb\x52\x90-FVE-FS-" + struct.pack("<HB", 512, 8)).ljust(510, b"\0") + b"\x55\xaa"


def bitlocker(identifier: UUID = FVE) -> bytes:
    """The volume header of Windows 7 and later."""
    header = bytearray(512)
    header[:14] = b"\xeb\x58\x90-FVE-FS-" + struct.pack("<HB", 512, 8)
    header[71:90] = b"NO NAME    FAT32   "
    header[160:176] = identifier.bytes_le
    struct.pack_into("<QQQ", header, 176, 35 * M, 76 * M, 117 * M)
    header[510:] = b"\x55\xaa"
    return bytes(header)


def bitlocker_to_go(identifier: UUID | None = FVE) -> bytes:
    """The volume header of BitLocker To Go; without an identifier, the header of an ordinary FAT32."""
    header = bytearray(512)
    header[:14] = b"\xeb\x58\x90MSWIN4.1" + struct.pack("<HB", 512, 8)
    header[71:90] = b"NO NAME    FAT32   "
    if identifier:
        header[424:440] = identifier.bytes_le
        struct.pack_into("<QQQ", header, 440, 3 * M, 4 * M, 5 * M)
    header[510:] = b"\x55\xaa"
    return bytes(header)


def core_storage(*, method: int = 2) -> bytes:
    """The volume header of a CoreStorage physical volume; *method* 2 is AES-XTS."""
    header = bytearray(512)
    struct.pack_into("<IHH", header, 4, 0xFFFFFFFF, 1, 0x10)
    header[88:90] = b"CS"
    struct.pack_into("<I", header, 90, 1)
    struct.pack_into("<II", header, 168, 16, method)
    struct.pack_into("<I", header, 0, _crc32c(0xFFFFFFFF, bytes(header[8:])))
    return bytes(header)


def ext4(*, encrypt: bool) -> bytes:
    """The first two kibibytes of an ext4 file system."""
    start = bytearray(2 * K)
    struct.pack_into("<H", start, K + 0x38, 0xEF53)
    struct.pack_into("<I", start, K + 0x60, 0x2C2 | (0x10000 if encrypt else 0))
    return bytes(start)


def md_superblock(data_offset: int) -> bytes:
    """A superblock of version 1.1 or 1.2; *data_offset* is in bytes from the start of the member."""
    return (
        struct.pack("<II", 0xA92B4EFC, 1).ljust(128, b"\0") + struct.pack("<Q", data_offset // 512)
    ).ljust(256, b"\0")


def physical_volume() -> bytes:
    """The first mebibyte of a physical volume made by LVM; the rest is data of logical volumes."""
    return zlib.decompress(base64.b64decode(LVM["first-mebibyte"]))


def luks_format(path: Path, version: int, size: int = 16 * M) -> bytes:
    """The content of a file of *size* bytes after ``cryptsetup luksFormat``."""
    with path.open("wb") as file:
        file.truncate(size)
    arguments = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    subprocess.run(
        ["cryptsetup", "luksFormat", "-q", "--type", f"luks{version}", *arguments, "--key-file", "-", path],
        input=b"secret",
        check=True,
    )
    return path.read_bytes()
