from __future__ import annotations

import json
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from support.guest_disks import GuestDisk, M, gpt, gpt_header, mbr
from support.images import require
from virt_sse.errors import ImageFormatError
from virt_sse.in_guest.partitions import MOST, Partition, partitions


def of(disk: GuestDisk) -> list[Partition]:
    return partitions(disk.read, disk.size)


def places(disk: GuestDisk) -> list[tuple[int, int]]:
    return [(partition.offset, partition.size) for partition in of(disk)]


SFDISK = {
    "mbr": "label: dos\nsize=4M\nsize=8M, type=7\n,\n",
    "logical": "label: dos\nsize=4M\nsize=40M, type=5\nsize=4M\nsize=2M\nsize=3M\nsize=1M\nsize=5M\n",
    "gpt": "label: gpt\nsize=4M\nsize=8M\nstart=30M, size=1M\n,\n",
    "gpt with a long table": "label: gpt\ntable-length: 240\nsize=4M\nsize=8M\n",
}
FDISK = {
    "mbr": "o n p 1 - +4M n p 2 - +8M n p 3 - - w",
    "logical": "o n p 1 - +4M n e 2 - - n l - +4M n l - +2M n l - +3M w",
    "gpt": "g n 1 - +4M n 2 - +8M n 7 - - w",
}


def image(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(64 * M)
    return path


def of_file(path: Path) -> list[Partition]:
    content = path.read_bytes()
    return partitions(lambda offset, length: content[offset : offset + length], len(content))


@pytest.mark.parametrize("name", SFDISK)
def test_partitions_made_by_sfdisk_are_found(tmp_path: Path, name: str) -> None:
    require("sfdisk")
    path = image(tmp_path / "disk")
    subprocess.run(["sfdisk", "-q", path], input=SFDISK[name].encode(), check=True)
    dump = json.loads(subprocess.run(["sfdisk", "--json", path], capture_output=True, check=True).stdout)
    expected = {(entry["start"] * 512, entry["size"] * 512) for entry in dump["partitiontable"]["partitions"]}
    found = of_file(path)
    assert expected <= {(partition.offset, partition.size) for partition in found}
    if "gpt" in name:
        assert len(found) == len(expected)


@pytest.mark.parametrize("name", FDISK)
def test_partitions_made_by_fdisk_with_large_sectors_are_found(tmp_path: Path, name: str) -> None:
    require("fdisk")
    path = image(tmp_path / "disk")
    answers = FDISK[name].replace("-", "").replace(" ", "\n") + "\n"
    subprocess.run(["fdisk", "-b", "4096", path], input=answers.encode(), capture_output=True, check=True)
    listing = subprocess.run(
        ["fdisk", "-b", "4096", "-l", "-o", "Start,Sectors", path], capture_output=True, check=True, text=True
    ).stdout.split("Sectors\n")[1]
    expected = [tuple(int(number) * 4096 for number in line.split()) for line in listing.splitlines()]
    assert len(expected) == FDISK[name].count("n ")
    assert set(expected) <= {(partition.offset, partition.size) for partition in of_file(path)}


def test_partitions_are_named_as_by_linux() -> None:
    disk = GuestDisk(64 * M)
    disk.write(0, mbr((0x83, 2048, 2048), (0x05, 8192, 16384)))
    disk.write(8192 * 512, mbr((0x83, 2048, 2048), (0x05, 4096, 4096)))
    disk.write((8192 + 4096) * 512, mbr((0x83, 2048, 2048)))
    assert [(each.name, each.offset, each.size) for each in of(disk) if each.name > "mbr-1"] == [
        ("mbr-2", 8192 * 512, 16384 * 512),
        ("mbr-5", 10240 * 512, 2048 * 512),
        ("mbr-6", 14336 * 512, 2048 * 512),
        ("mbr-2", 8192 * 4096, 64 * M - 8192 * 4096),
    ]


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("damage", ["header", "table", "both wiped"])
def test_a_damaged_gpt_is_read_from_its_backup(sector: int, damage: str) -> None:
    disk = GuestDisk(64 * M)
    gpt(disk, [(512, 1023), (2048, 3071)], sector=sector)
    expected = [(512 * sector, 512 * sector), (2048 * sector, 1024 * sector)]
    assert places(disk) == expected
    disk.write(0, bytes(512))
    assert places(disk) == expected, "without a protective MBR, which some guests do not ask for"
    if damage != "table":
        disk.write(sector + 40, b"\xff")
    if damage != "header":
        disk.write(2 * sector, b"\xff" * 16)
    if damage == "both wiped":
        disk.write(0, bytes(8 * sector))
    assert places(disk) == expected
    disk.write(disk.size - sector + 40, b"\xff")
    assert places(disk) == []


def test_a_whole_primary_gpt_goes_before_the_backup() -> None:
    disk = GuestDisk(64 * M)
    gpt(disk, [(4096, 8191)])
    backup = disk.read(disk.size - 64 * 512, 64 * 512)
    gpt(disk, [(2048, 4095)])
    disk.write(disk.size - 64 * 512, backup)
    assert (4096 * 512, 4096 * 512) not in places(disk)
    assert (2048 * 512, 2048 * 512) in places(disk)


def test_partitions_beyond_the_end_are_cut_off() -> None:
    disk = GuestDisk(4 * M)
    disk.write(0, mbr((0x83, 2048, 0xFFFFFFFF), (0x83, 0xFFFFFFFF, 1), (0x83, 0, 5), (0x83, 4096, 0)))
    assert places(disk) == [(M, 3 * M)]
    disk = GuestDisk(4 * M)
    gpt(disk, [(2048, 2**64 - 1), (2**63, 2**64 - 2), (5, 4)])
    assert places(disk) == [(M, 3 * M)]


def test_partitions_at_the_same_place_are_one() -> None:
    disk = GuestDisk(4 * M)
    disk.write(0, mbr((0x83, 2048, 5), (0x83, 2048, 2048), (0x83, 2048, 7), (0x83, 2049, 7)))
    assert places(disk) == [(M, M), (M + 512, 7 * 512)]


CHAINS = {
    "of itself": {8: mbr((0x83, 1, 1), (0x05, 0, 9))},
    "of two": {8: mbr((0x83, 1, 1), (0x05, 8, 9)), 16: mbr((0x83, 1, 1), (0x05, 0, 9))},
    "into the MBR": {8: mbr((0x83, 1, 1), (0x05, 2**32 - 8, 9))},
    "all four entries, each on": {
        8 + at: mbr(*((0x05, (at * 4 + entry) % 64, 1) for entry in range(4))) for at in range(64)
    },
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_of_tables_is_not_followed_in_circles(chain: str) -> None:
    disk = GuestDisk(M)
    disk.write(0, mbr((0x05, 8, 100), (0x0F, 8, 100), (0x85, 8, 100), (0x05, 0, 100)))
    for sector, table in CHAINS[chain].items():
        disk.write(sector * 512, table)
    of(disk)
    assert disk.reads < 1000


def test_an_endless_chain_is_refused() -> None:
    disk = GuestDisk(16 * M)
    disk.write(0, mbr((0x05, 8, 100)))
    for at in range(MOST + 10):
        disk.write((8 + 2 * at) * 512, mbr((0, 0, 0), (0x05, 2 * at + 2, 1)))
    with pytest.raises(ImageFormatError, match="more than 1024 partition tables"):
        of(disk)


def test_too_many_partitions_are_refused() -> None:
    disk = GuestDisk(16 * M)
    gpt(disk, [(4096 + at, 4096 + at) for at in range(MOST + 1)], count=MOST + 1)
    with pytest.raises(ImageFormatError, match="more than 1024 partitions"):
        of(disk)


@pytest.mark.parametrize(
    ("count", "entry_size"),
    [
        (2**32 - 1, 128),
        (128, 2**31),
        (2**32 - 1, 2**32 - 1),
        (0, 128),
        (128, 0),
        (128, 64),
        (128, 192),
        (2**15 + 1, 128),
    ],
)
def test_a_gpt_with_an_invalid_table_is_ignored(count: int, entry_size: int) -> None:
    disk = GuestDisk(16 * M)
    disk.write(512, gpt_header(1, 2, 2, count, entry_size, 0))
    assert of(disk) == []
    assert disk.reads < 20


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 4096, 8192])
def test_partitions_of_a_tiny_disk_lie_within_the_disk(size: int) -> None:
    disk = GuestDisk(size)
    disk.write(0, mbr((0x05, 0, 1), (0x83, 1, 9))[:size])
    disk.write(512, gpt_header(1, 1, 0, 4, 128, zlib.crc32(disk.read(0, 512))))
    for partition in of(disk):
        assert 0 < partition.offset < partition.offset + partition.size <= size


def test_gpt_entries_may_be_larger_than_usual() -> None:
    disk = GuestDisk(16 * M)
    table = b"".join(struct.pack("<16s16sQQ208x", b"t" * 16, b"u" * 16, at, at + 9) for at in (2048, 4096))
    disk.write(1024, table)
    disk.write(512, gpt_header(1, 2, 2, 2, 256, zlib.crc32(table)))
    assert places(disk) == [(2048 * 512, 5120), (4096 * 512, 5120)]
