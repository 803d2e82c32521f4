from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from virt_sse.errors import ImageFormatError, ToolError
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu.formatting import Volume, make
from virt_sse.qemu.luks import FIRST_KEYSLOT, HEADER_END, Luks1Header, make_header

DEK = Dek.generate()


@pytest.fixture(scope="module")
def header() -> bytes:
    images.require("cryptsetup")
    return make_header(AES_256_XTS, DEK)


def test_a_header_opens_with_its_dek_alone(header: bytes, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.write_bytes(header + bytes(1 << 20))
    test = ("open", "--test-passphrase", "--key-file", "-", volume)
    assert images.cryptsetup(*test, stdin=DEK.passphrase).returncode == 0
    assert images.cryptsetup(*test, stdin=Dek.generate().passphrase).returncode == 2


def test_the_fields_of_a_header_are_read(header: bytes) -> None:
    parsed = Luks1Header.parse(header)
    assert parsed.cipher == AES_256_XTS
    assert parsed.volume_key_bytes == 64
    assert parsed.payload_offset == len(header)
    assert [slot.active for slot in parsed.keyslots] == [True] + [False] * 7
    assert parsed.keyslots[0].offset == FIRST_KEYSLOT
    assert {slot.stripes for slot in parsed.keyslots} == {4000}


def test_the_gap_is_empty(header: bytes) -> None:
    assert header[HEADER_END:FIRST_KEYSLOT] == bytes(FIRST_KEYSLOT - HEADER_END)


def test_no_two_headers_share_salts_and_volume_key(header: bytes) -> None:
    again = make_header(AES_256_XTS, DEK)
    for start, end in ((112, 132), (132, 164), (168, 204), (216, 248), (FIRST_KEYSLOT, FIRST_KEYSLOT + 64)):
        assert header[start:end] != again[start:end]


def test_cbc_has_a_volume_key_of_256_bits() -> None:
    parsed = Luks1Header.parse(make_header(Cipher.parse("aes-256-cbc"), DEK))
    assert (parsed.cipher, parsed.volume_key_bytes) == (AES_256_CBC, 32)


@pytest.mark.slow
@pytest.mark.parametrize("cipher", ["aes-256-xts", "serpent-256-cbc"])
def test_headers_of_qemus_formatter_are_read(cipher: str, tmp_path: Path) -> None:
    """cryptsetup makes those of aes; the others need QEMU's formatter where the kernel lacks the cipher."""
    images.require("qemu-img", "cryptsetup")
    path = tmp_path / "image"
    make(path, DiskFormat.RAW, 1 << 20, [Volume(Cipher.parse(cipher), DEK)])
    parsed = Luks1Header.parse(path.read_bytes()[:HEADER_END])
    assert parsed.cipher == Cipher.parse(cipher)
    assert path.stat().st_size == parsed.payload_offset + (1 << 20)
    assert images.KeyedImage(path, "raw", DEK.passphrase).size() == 1 << 20


def changed(offset: int, layout: str, value: int) -> Callable[[bytes], bytes]:
    def change(header: bytes) -> bytes:
        content = bytearray(header)
        struct.pack_into(layout, content, offset, value)
        return bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: b"", "no LUKS header"),
        (lambda header: header[: HEADER_END - 1], "no LUKS header"),
        (lambda _: bytes(HEADER_END), "no LUKS header"),
        (changed(6, ">H", 2), "LUKS version 2, not 1"),
        (changed(104, ">I", 4032), "unexpected offsets"),
        (changed(104, ">I", 8), "unexpected offsets"),
        (changed(104, ">I", 0), "unexpected offsets"),
        (changed(104, ">I", 0xFFFFFFFF), "unexpected offsets"),
        (changed(108, ">I", 1 << 20), "unexpected offsets"),
        (changed(208 + 40, ">I", 7), "unexpected offsets"),
        (changed(208 + 48 + 44, ">I", 0xFFFFFFFF), "unexpected offsets"),
        (changed(164, ">I", 1 << 30), "with 1073741824 iterations"),
        (changed(208 + 4, ">I", 0xFFFFFFFF), "with 4294967295 iterations"),
    ],
)
def test_a_damaged_header_is_refused_with_the_reason(
    header: bytes, change: Callable[[bytes], bytes], reason: str
) -> None:
    with pytest.raises(ImageFormatError, match=reason):
        Luks1Header.parse(change(header)[:HEADER_END])


def test_a_missing_cryptsetup_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "setpriv").symlink_to(Path("/usr/bin/setpriv"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="cryptsetup is not installed"):
        make_header(AES_256_XTS, DEK)
