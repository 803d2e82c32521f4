from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import images
from support.images import FORMATS, KeyedImage
from virt_sse.errors import DiskInUseError, ImageError, ImageFormatError, ToolError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, image_file, img, reading
from virt_sse.qemu.formatting import Volume

M = 1 << 20
DEK = Dek.generate()


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


def make(path: Path, image_format: str, size: int = M, cipher: Cipher = AES_256_XTS) -> KeyedImage:
    formatting.make(path, DiskFormat(image_format), size, [Volume(cipher, DEK)])
    return KeyedImage(path, image_format, DEK.passphrase)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_format", "cipher"),
    [
        ("raw", "aes-256-cbc"),
        ("qcow2", "aes-256-cbc"),
        ("raw", "serpent-256-xts"),
        ("qcow2", "twofish-256-xts"),
        ("raw", "twofish-256-cbc"),
    ],
)
def test_qemu_reads_an_image_of_every_cipher(tmp_path: Path, image_format: str, cipher: str) -> None:
    image = make(tmp_path / "image", image_format, M + 512, Cipher.parse(cipher))
    luks = images.info(image.path)["format-specific"]["data"]
    luks = luks.get("encrypt", luks)
    assert f"{luks['cipher-alg']}-{luks['cipher-mode']}" == cipher
    assert image.size() == M + 512
    image.write(0, M, 0x29)
    assert image.has(0, M, 0x29)
    assert not images.contains([image.path], b"\x29" * 16)
    assert images.mode(image.path) == 0o600
    with image_file.opened(image.path) as descriptor:
        assert image_file.probe_format(descriptor) is DiskFormat(image_format)
        assert image_file.usable_size(descriptor, DiskFormat(image_format)) == M + 512


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_existing_file_is_not_overwritten(tmp_path: Path, image_format: str) -> None:
    (tmp_path / "image").write_text("theirs")
    with pytest.raises(FileExistsError):
        make(tmp_path / "image", image_format)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        make(tmp_path / "link", image_format)
    assert (tmp_path / "image").read_text() == "theirs"
    with pytest.raises(FileNotFoundError):
        make(tmp_path / "missing/image", image_format)


def test_info_tells_format_size_and_encryption(tmp_path: Path) -> None:
    plain = images.make_plain(tmp_path / "plain", "qcow2", bytes(M))
    assert img.info(plain) == img.ImageInfo("qcow2", M, encrypted=False, other_files=())
    assert img.info(plain, "raw").format == "raw"
    assert img.info(make(tmp_path / "luks", "raw").path).encrypted
    vmdk = images.make_plain(tmp_path / "vmdk", "vmdk", bytes(M))
    assert img.info(vmdk).other_files == ()
    for image_format in ("vdi", "nonsense"):
        with pytest.raises(ToolError, match="qemu-img: "):
            img.info(plain, image_format)
    with pytest.raises(ImageError, match="missing: No such file"):
        img.info(tmp_path / "missing")


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_opens_with_its_own_dek_alone(tmp_path: Path, image_format: str) -> None:
    image = make(tmp_path / "a 'name', with: all=sorts", image_format)
    img.check(image.path, DiskFormat(image_format), [DEK])
    with pytest.raises(ImageFormatError, match="does not open with its DEK"):
        img.check(image.path, DiskFormat(image_format), [Dek.generate()])
    other = DiskFormat.RAW if image_format == "qcow2" else DiskFormat.QCOW2
    with pytest.raises(ImageFormatError):
        img.check(image.path, other, [DEK])


def test_damage_to_a_qcow2_is_found(tmp_path: Path) -> None:
    image = make(tmp_path / "a-block-of-locks", "qcow2")
    image.write(0, M, 1)
    content = bytearray(image.path.read_bytes())
    content[65536:65544] = b"\xff" * 8  # the refcount table
    image.path.write_bytes(content)
    with pytest.raises(ImageFormatError, match=r"is damaged|does not open"):
        img.check(image.path, DiskFormat.QCOW2, [DEK])


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_erased_image_never_opens_again(tmp_path: Path, image_format: str) -> None:
    image = make(tmp_path / "image", image_format)
    image.write(0, M, 1)
    before = image.path.read_bytes()
    start = before.index(b"LUKS\xba\xbe")
    with image_file.opened(image.path) as descriptor:
        offset, length = image_file.luks_area(descriptor, DiskFormat(image_format))
    assert offset == start
    image_file.erase(image.path, DiskFormat(image_format))
    after = image.path.read_bytes()
    assert not image.opens()
    assert after[:offset] == before[:offset]
    assert after[offset + length :] == before[offset + length :]
    same = sum(a == b for a, b in zip(after[offset:][:length], before[offset:][:length], strict=True))
    assert same < length // 100  # 1 in 256 by chance
    image_file.erase(image.path, DiskFormat(image_format))  # as after a kill: there is no header
    assert len(image.path.read_bytes()) == len(before)


@pytest.mark.parametrize("named", [2**63 - 1, 2**64 - 1, 16, 0])
def test_what_is_erased_is_bounded_by_the_file_and_covers_the_keyslots(tmp_path: Path, named: int) -> None:
    image = make(tmp_path / "image", "qcow2")
    with image_file.opened(image.path) as descriptor:
        offset, length = image_file.luks_area(descriptor, DiskFormat.QCOW2)
    images.rewrite_luks_pointer(image.path, offset, named)
    before = image.path.read_bytes()
    image_file.erase(image.path, DiskFormat.QCOW2)
    after = image.path.read_bytes()
    assert len(after) == len(before)
    same = sum(a == b for a, b in zip(after[offset:][:length], before[offset:][:length], strict=True))
    assert same < length // 100


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, 2**40])
def test_a_luks_header_outside_of_the_file_is_damage(tmp_path: Path, offset: int) -> None:
    image = make(tmp_path / "image", "qcow2")
    images.rewrite_luks_pointer(image.path, offset, 1 << 20)
    with (
        image_file.opened(image.path) as descriptor,
        pytest.raises(ImageFormatError, match="outside of the file"),
    ):
        image_file.luks_area(descriptor, DiskFormat.QCOW2)
    size = image.path.stat().st_size
    image_file.erase(image.path, DiskFormat.QCOW2)
    assert image.path.stat().st_size == size
    assert b"LUKS" not in image.path.read_bytes()


def test_a_size_beyond_any_file_is_damage(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "qcow2")
    with image.path.open("r+b") as file:
        file.seek(24)
        file.write((2**63).to_bytes(8, "big"))
    with image_file.opened(image.path) as descriptor, pytest.raises(ImageFormatError, match="invalid size"):
        image_file.usable_size(descriptor, DiskFormat.QCOW2)


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_open_image_is_noticed(tmp_path: Path, image_format: str) -> None:
    image = make(tmp_path / "image", image_format)
    image_file.refuse_if_open(image.path)
    with image_file.opened(image.path):
        image_file.refuse_if_open(image.path)  # we are no QEMU
    for read_only in (False, True):
        with image.held(read_only=read_only), pytest.raises(DiskInUseError):
            image_file.refuse_if_open(image.path)
        img.check_unlocks(image.path, DiskFormat(image_format), [DEK])
    with image.held():
        img.check_unlocks(image.path, DiskFormat(image_format), [DEK])
        with pytest.raises(DiskInUseError):
            img.resize(image.path, DiskFormat(image_format), 2 * M, [DEK], shrink=False)


def test_a_path_that_is_no_image_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in (
        (tmp_path / "missing", "is missing"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "loop", "cannot open"),
    ):
        with pytest.raises(ImageError, match=reason), image_file.opened(path):
            pass


@pytest.mark.parametrize("content", [b"", b"text", bytes(8192), b"QFI\xfb", b"LUKS\xba\xbe\0\1"])
def test_an_image_without_a_luks_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image").write_bytes(content)
    with image_file.opened(tmp_path / "image") as descriptor:
        for image_format in DiskFormat:
            with pytest.raises(ImageFormatError):
                image_file.luks_area(descriptor, image_format)


def test_a_raw_image_that_ends_within_its_header_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "raw")
    os.truncate(image.path, 5000)
    with image_file.opened(image.path) as descriptor, pytest.raises(ImageFormatError, match="without data"):
        image_file.usable_size(descriptor, DiskFormat.RAW)
    with pytest.raises(ImageFormatError):
        img.check(image.path, DiskFormat.RAW, [DEK])


def test_errors_of_qemus_formatter_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot make a LUKS image with rot13-256-xts"):
        make(tmp_path / "image", "raw", M, Cipher("rot13-256", "xts"))


def test_nothing_holds_an_image_after_it_was_read(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "raw")
    for _ in range(20):
        with reading.plaintext(image.path, DiskFormat.RAW, [DEK]) as reader:
            reader.read(0, 512)
        image_file.refuse_if_open(image.path)
