from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import guest_disks
from support.guest_disks import LUKS1, LUKS2, LVM, GuestDisk, K, M, gpt, gpt_header, mbr
from virt_sse.errors import ImageFormatError, KeyDeniedError, PolicyError
from virt_sse.in_guest.containers import volumes
from virt_sse.in_guest.inspection import _MOST_READS, inspect
from virt_sse.model.content import Content, EncryptionKind, Finding, described

PIECES = LVM["pieces"]


def of(disk: GuestDisk) -> list[Finding]:
    return inspect(disk.read, disk.size)


def places(disk: GuestDisk) -> list[tuple[str, int, str]]:
    return [(finding.partition, finding.offset, finding.kind.value) for finding in of(disk)]


def test_luks_on_a_whole_disk_is_found() -> None:
    disk = GuestDisk(64 * M)
    disk.write(0, LUKS1)
    assert of(disk) == [Finding("disk", 0, 64 * M, EncryptionKind.LUKS1)]


def test_encrypted_partitions_are_found() -> None:
    disk = GuestDisk(64 * M)
    gpt(disk, [(2048, 4095), (8192, 16383), (20480, 40959), (65536, 65599)])
    disk.write(8192 * 512, LUKS2)
    disk.write(20480 * 512, guest_disks.bitlocker())
    disk.write(65536 * 512, guest_disks.ext4(encrypt=True))
    assert of(disk) == [
        Finding("gpt-2", 8192 * 512, 4 * M, EncryptionKind.LUKS2),
        Finding("gpt-3", 20480 * 512, 10 * M, EncryptionKind.BITLOCKER),
        Finding("gpt-4", 65536 * 512, 64 * 512, EncryptionKind.EXT4_ENCRYPT),
    ]
    assert described(of(disk)) == "LUKS2 (gpt-2), BitLocker (gpt-3), ext4 encrypt (gpt-4)"


def test_encryption_is_found_in_logical_partitions_of_large_sectors() -> None:
    disk = GuestDisk(256 * M)
    disk.write(0, mbr((0x83, 256, 256), (0x0F, 1024, 30000)))
    disk.write(1024 * 4096, mbr((0x83, 256, 256), (0x05, 4096, 9000)))
    disk.write((1024 + 4096) * 4096, mbr((0x83, 256, 256)))
    disk.write((1024 + 4096 + 256) * 4096, LUKS2)
    assert places(disk) == [("mbr-6", (1024 + 4096 + 256) * 4096, "LUKS2")]


def test_a_disk_without_encryption_has_no_finding() -> None:
    disk = GuestDisk(64 * M)
    gpt(disk, [(2048, 4095), (8192, 16383)])
    disk.write(4096 * 512 + 512, LUKS1)
    disk.write(8192 * 512, guest_disks.ext4(encrypt=False))
    assert of(disk) == []
    assert disk.reads < 100


@pytest.fixture
def lvm() -> GuestDisk:
    """A GPT with a physical volume of LVM as its first partition."""
    disk = GuestDisk(128 * M)
    gpt(disk, [(2048, 2048 + LVM["size"] // 512 - 1)])
    disk.write(M, guest_disks.physical_volume())
    return disk


def test_encrypted_logical_volumes_are_found(lvm: GuestDisk) -> None:
    assert places(lvm) == []
    for offset in PIECES[1:]:
        lvm.write(M + offset, LUKS2)
    assert places(lvm) == [("gpt-1/lvm", M + offset, "LUKS2") for offset in PIECES[1:]]


def test_lvm_metadata_that_wraps_around_its_ring_is_read() -> None:
    content = bytearray(guest_disks.physical_volume())
    area, size = 4096, M - 4096
    offset, length = struct.unpack_from("<QQ", content, area + 40)
    text = bytes(content[area + offset : area + offset + length])
    content[area + 512 :] = bytes(M - area - 512)
    struct.pack_into("<Q", content, area + 40, size - 100)
    content[area + size - 100 :] = text[:100]
    content[area + 512 : area + 512 + length - 100] = text[100:]
    found = volumes(lambda at, length: bytes(content[at : at + length]), LVM["size"])
    assert [volume.offset for volume in found] == PIECES


def test_encryption_is_found_in_logical_volumes_in_a_raid_member() -> None:
    for superblock in (0, 4096):
        disk = GuestDisk(128 * M)
        disk.write(superblock, guest_disks.md_superblock(2 * M))
        disk.write(2 * M, LUKS1)
        assert places(disk) == [("disk/md", 2 * M, "LUKS1")]
        disk.write(2 * M, guest_disks.physical_volume())
        disk.write(2 * M + PIECES[2], LUKS2)
        assert places(disk) == [("disk/md/lvm", 2 * M + PIECES[2], "LUKS2")]


def test_a_physical_volume_within_itself_ends() -> None:
    disk = GuestDisk(512 * M)
    for at in range(0, 400 * M, 4 * M):
        disk.write(at, guest_disks.physical_volume()[: 16 * K])
    try:
        of(disk)
    except ImageFormatError as exc:
        assert "too many partitions and volumes" in str(exc)  # noqa: PT017 -- either is right
    assert disk.reads <= _MOST_READS


HOSTILE_TEXT = {
    "no end of names": b"a" * M,
    "no end of stripes": b'"pv0", 1\n' * 100_000,
    "many stripes": b"".join(b'"pv0", %d\n' % number for number in range(50_000)),
    "large numbers": b'"pv0", 9999999999\nextent_size = 9999999999\npe_start = 9999999999999999\n' * 9,
    "quotes": b'"' * M,
}


@pytest.mark.parametrize("name", HOSTILE_TEXT)
def test_hostile_lvm_metadata_is_bounded_and_gives_no_crash(name: str) -> None:
    content = bytearray(guest_disks.physical_volume())
    identifier = b"mbo4UO-afJE-JCzV-rkUH-DLwy-ZtPl-4evO6X"
    text = b'pv0 {\nid = "' + identifier + b'"\npe_start = 2048\n}\nextent_size = 8\n' + HOSTILE_TEXT[name]
    text = text[: M - 4096 - 512]
    content[4096 + 512 :] = text.ljust(M - 4096 - 512, b"\0")
    struct.pack_into("<QQ", content, 4096 + 40, 512, len(text))
    disk = GuestDisk(64 * M)
    disk.write(0, bytes(content))
    try:
        assert of(disk) == []
    except ImageFormatError as exc:
        assert "logical volumes" in str(exc)  # noqa: PT017 -- either is right


def hostile(seed: int) -> GuestDisk:
    """A disk with all that is looked at on it, then damaged at random where it steers the reader."""
    rng = random.Random(seed)  # noqa: S311 -- the same in each run
    sector = rng.choice((512, 4096))
    disk = GuestDisk(rng.choice((4 * K, 64 * K, M, 32 * M, 2**40 + 512)))
    total = disk.size // sector

    def place() -> int:
        return rng.choice((0, 1, 2, 63, 2048, total - 1, total, 2**32 - 1, rng.randrange(max(1, total))))

    def entry() -> tuple[int, int, int]:
        kind = rng.choice((0x83, 5, 5, 0x0F, 0xEE, 0))
        return kind, place() & 0xFFFFFFFF, rng.choice((1, 2048, 2**32 - 1))

    disk.write(0, mbr(*(entry() for _ in range(4))))
    for _ in range(rng.randrange(12)):
        at = place() * sector
        sample = rng.choice(
            (
                lambda: mbr(*(entry() for _ in range(rng.randrange(1, 5)))),
                lambda: LUKS2,
                lambda: guest_disks.physical_volume()[: 8 * K],
                lambda: guest_disks.md_superblock(place() * 512 & 2**63 - 1),
                lambda: b"SKUL\xba\xbe\0\2" + struct.pack(">Q", rng.choice((16 * K, 4 * M, 2**63))),
                lambda: rng.randbytes(2 * K),
            )
        )()
        disk.write(at, sample)
    if rng.random() < 0.7:
        entries = b"".join(
            struct.pack("<16s16sQQ", b"t" * 16, b"u" * 16, place(), rng.choice((place(), 2**64 - 1)))
            + bytes(72)
            for _ in range(16)
        )
        disk.write(2 * sector, entries)
        header = bytearray(gpt_header(1, total - 1 & 2**64 - 1, 2, 16, 128, zlib.crc32(entries)))
        if rng.random() < 0.5:  # a field that no longer fits, under a checksum that does
            header[rng.randrange(12, 92)] = rng.randrange(256)
            header[16:20] = bytes(4)
            header[16:20] = struct.pack("<I", zlib.crc32(header[:92]))
        disk.write(sector, bytes(header))
    return disk


def seeds() -> Iterator[int]:
    yield from range(400)


@pytest.mark.slow
def test_no_random_disk_crashes_or_stalls_the_inspection() -> None:
    found = refused = 0
    for seed in seeds():
        disk = hostile(seed)
        try:
            findings = of(disk)
        except ImageFormatError:
            refused += 1
            continue
        finally:
            assert disk.reads <= _MOST_READS, seed
        for finding in findings:
            assert 0 <= finding.offset < finding.offset + finding.size <= disk.size, seed
        assert findings == sorted(set(findings), key=lambda each: (each.offset, each.kind.value)), seed
        found += bool(findings)
    assert found > 20, "the disks are not worth looking at"
    assert refused < found


def test_the_work_is_bounded() -> None:
    """As many volumes as there can be, each with as much to read as there can be."""
    disk = GuestDisk(2**40)
    gpt(disk, [(2048 + at, 2**30) for at in range(1000)], count=1024)
    for at in range(1000):
        disk.write((2048 + at) * 512, guest_disks.md_superblock(512)[:256])
    with pytest.raises(ImageFormatError, match="too many partitions and volumes to inspect"):
        inspect(_endless(disk), disk.size)
    assert disk.reads <= _MOST_READS


def _endless(disk: GuestDisk) -> Callable[[int, int], bytes]:
    """*disk*; where there is nothing on it, what looks like a second LUKS2 header until all of it is read."""

    def read(offset: int, length: int) -> bytes:
        content = disk.read(offset, length)
        if length == 512 and not any(content):
            header = bytearray(512)
            header[:16] = b"SKUL\xba\xbe\0\2" + struct.pack(">Q", 4 * M)
            header[72:78] = b"sha256"
            header[256:264] = struct.pack(">Q", 4 * M)
            return bytes(header)
        return content

    return read


def test_content_is_inspected_once_and_only_on_demand(tmp_path: Path) -> None:
    asked = []

    def look() -> list[Finding]:
        asked.append(1)
        return [Finding("disk", 0, M, EncryptionKind.LUKS1)]

    content = Content(look)
    assert asked == []
    assert content.in_guest_encryption() == content.in_guest_encryption()
    assert asked == [1]


def test_a_key_that_cannot_be_used_is_no_pass() -> None:
    def look() -> list[Finding]:
        raise KeyDeniedError("key vault refused the unwrap")

    with pytest.raises(PolicyError, match=r"cannot inspect .*: key vault refused the unwrap"):
        Content(look).in_guest_encryption()
