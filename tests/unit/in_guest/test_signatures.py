from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from support import guest_disks
from support.guest_disks import GuestDisk, K, M, luks_format
from support.images import require
from virt_sse.in_guest.signatures import _crc32c, kinds
from virt_sse.model.content import EncryptionKind


def of(content: bytes) -> list[EncryptionKind]:
    return kinds(lambda offset, length: content[offset : offset + length])


@pytest.mark.parametrize("version", [1, 2])
def test_luks_made_by_cryptsetup_is_known(tmp_path: Path, version: int) -> None:
    require("cryptsetup")
    content = luks_format(tmp_path / "luks", version)
    assert of(content) == [EncryptionKind(f"LUKS{version}")]
    assert of(content[:512]) == [EncryptionKind(f"LUKS{version}")]
    assert of(bytes(512) + content) == []


@pytest.mark.parametrize("metadata", [None, 32, 4096])
def test_luks2_is_known_by_its_second_header(tmp_path: Path, metadata: int | None) -> None:
    require("cryptsetup")
    path = tmp_path / "luks"
    luks_format(path, 2)
    offset = 16 * K
    if metadata:
        sizes = ["--luks2-metadata-size", f"{metadata}k", "--luks2-keyslots-size", "4M"]
        path.write_bytes(bytes(32 * M))
        subprocess.run(
            ["cryptsetup", "luksFormat", "-q", "--type", "luks2", "--key-file", "-", path, *sizes]
            + ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"],
            input=b"secret",
            check=True,
        )
        offset = metadata * K
    wiped = bytes(4 * K) + path.read_bytes()[4 * K :]
    assert wiped[offset : offset + 6] == b"SKUL\xba\xbe"
    assert of(wiped) == [EncryptionKind.LUKS2]
    assert of(wiped[: offset + 5000]) == [], "cut off in the header"
    torn = bytearray(wiped)
    torn[offset + 4 * K + 10] ^= 1
    assert of(bytes(torn)) == [], "cryptsetup would not take it either"
    moved = bytes(offset) + wiped
    assert of(moved) == [], "a header says where it lies"


def test_luks_of_an_unknown_version_is_not_known() -> None:
    assert of(b"LUKS\xba\xbe\0\x07".ljust(4096, b"\0")) == []


BEGINNINGS = {
    "BitLocker of Vista": (guest_disks.BITLOCKER_VISTA, EncryptionKind.BITLOCKER),
    "BitLocker": (guest_disks.bitlocker(), EncryptionKind.BITLOCKER),
    "BitLocker of used space": (
        guest_disks.bitlocker(guest_disks.FVE_USED_SPACE),
        EncryptionKind.BITLOCKER,
    ),
    "BitLocker To Go": (guest_disks.bitlocker_to_go(), EncryptionKind.BITLOCKER_TO_GO),
    "BitLocker To Go of used space": (
        guest_disks.bitlocker_to_go(guest_disks.FVE_USED_SPACE),
        EncryptionKind.BITLOCKER_TO_GO,
    ),
    "FileVault": (guest_disks.core_storage(), EncryptionKind.FILEVAULT),
    "ext4 with encrypted folders": (guest_disks.ext4(encrypt=True), EncryptionKind.EXT4_ENCRYPT),
    "ext4": (guest_disks.ext4(encrypt=False), None),
    "FAT32": (guest_disks.bitlocker_to_go(None), None),
    "NTFS": (b"\xeb\x52\x90NTFS    ".ljust(510, b"\0") + b"\x55\xaa", None),
    "CoreStorage without a cipher": (guest_disks.core_storage(method=0), None),
    "CoreStorage with a wrong checksum": (b"\1" + guest_disks.core_storage()[1:], None),
    "nothing": (b"", None),
    "zeros": (bytes(8 * M), None),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_every_signature_is_known_and_survives_truncation(name: str) -> None:
    content, kind = BEGINNINGS[name]
    assert of(content.ljust(4096, b"\0")) == ([kind] if kind else [])
    for length in (0, 1, 11, 89, 200, 511, 1100):
        assert of(content[:length]) in ([], [kind]), "cut off"


def test_ext4_encryption_made_by_mke2fs_is_known(tmp_path: Path) -> None:
    require("mke2fs")
    for features, expected in (("encrypt", [EncryptionKind.EXT4_ENCRYPT]), ("^encrypt", [])):
        path = tmp_path / features
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", features, path, "8M"], check=True)
        assert of(path.read_bytes()) == expected


@pytest.mark.parametrize("name", ["BitLocker of Vista", "BitLocker", "BitLocker To Go"])
def test_blkid_knows_our_samples(tmp_path: Path, name: str) -> None:
    require("blkid")
    disk = GuestDisk(256 * M)
    disk.write(0, BEGINNINGS[name][0])
    for offset in (3 * M, 35 * M):  # where the volume headers say that metadata is
        disk.write(offset, b"-FVE-FS-\0\0\2\0")
    path = disk.save(tmp_path / "volume")
    done = subprocess.run(["blkid", "-p", "-o", "value", "-s", "TYPE", path], capture_output=True, check=True)
    assert done.stdout.strip() == b"BitLocker"


def test_crc32c_gives_the_values_of_rfc_3720() -> None:
    """RFC 3720, appendix B.4, whose values are inverted at the end."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        assert _crc32c(0xFFFFFFFF, data) ^ 0xFFFFFFFF == crc
