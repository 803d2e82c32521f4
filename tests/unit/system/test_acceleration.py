"""The library is preloaded into QEMU's tools, from a place that other users cannot change."""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as OpensslCipher
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from support import images
from support.images import KeyedImage
from support.nettle_xts import Statistics
from virt_sse.errors import ToolError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import conversion, formatting, image_file
from virt_sse.qemu.formatting import Volume
from virt_sse.system import acceleration, confinement, tools
from virt_sse.system.confinement import Confinement

SIZE = 3 << 20
SECTOR = 512
DEK = Dek.generate()
SEED = 21


@pytest.fixture
def candidate() -> Iterator[Path]:
    """A file in a folder that all users can read."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder, "folder", "library.so")
        path.parent.mkdir(mode=0o755)
        path.touch(mode=0o644)
        yield path


def write_for_all(path: Path) -> None:
    path.chmod(0o646)


def write_folder_for_all(path: Path) -> None:
    path.parent.chmod(0o757)


def hide_file(path: Path) -> None:
    path.chmod(0o600)


def hide_folder(path: Path) -> None:
    path.parent.chmod(0o700)


def remove(path: Path) -> None:
    path.unlink()


def test_a_library_that_only_its_owner_can_change_has_no_obstacle(candidate: Path) -> None:
    assert acceleration.obstacle(candidate) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (write_for_all, "other users may write"),
        (write_folder_for_all, "other users may write"),
        (hide_file, "users of storage processes cannot read"),
        (hide_folder, "users of storage processes cannot read"),
        (remove, "not built"),
    ],
)
def test_an_unsafe_library_is_not_used(
    candidate: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], reason: str
) -> None:
    change(candidate)
    monkeypatch.setattr(acceleration, "LIBRARY", candidate)
    assert reason in str(acceleration.obstacle(candidate))
    assert acceleration.library() is None
    assert "LD_PRELOAD" not in acceleration.environment()


@pytest.mark.root
def test_a_library_of_another_users_is_not_used(candidate: Path) -> None:
    os.chown(candidate, 65534, -1)
    assert "belongs to user 65534" in str(acceleration.obstacle(candidate))


def test_a_path_that_ld_preload_cannot_name_is_not_used(candidate: Path) -> None:
    renamed = candidate.rename(candidate.with_name("a library.so"))
    assert "a space or a colon" in str(acceleration.obstacle(renamed))


def test_a_library_preloaded_by_the_caller_stays(candidate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "LIBRARY", candidate)
    assert acceleration.environment({"LD_PRELOAD": "/a.so"})["LD_PRELOAD"] == f"{candidate}:/a.so"


@pytest.fixture
def library() -> Path:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    found = acceleration.library()
    if found is None:
        pytest.skip(f"the XTS library: {acceleration.obstacle()}")
    return found


def test_only_qemus_tools_load_the_library(library: Path) -> None:
    assert str(library) not in tools.run(["env"], confinement=Confinement())


def test_qemu_takes_the_path_that_the_environment_asks_for(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert acceleration.path_in_qemu()
    monkeypatch.setenv("VIRT_SSE_XTS", "portable")
    assert acceleration.path_in_qemu() == "portable"
    monkeypatch.setenv("VIRT_SSE_XTS", "nettle")
    assert acceleration.path_in_qemu() is None


def test_a_file_that_is_no_library_is_reported_and_stops_no_tool(
    candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.require("qemu-img")
    monkeypatch.setattr(acceleration, "LIBRARY", candidate)
    with pytest.raises(ToolError, match=re.escape(f"qemu-img does not load {candidate}")):
        acceleration.path_in_qemu()
    assert tools.run(["qemu-img", "--version"], confinement=Confinement()).startswith("qemu-img version")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_format", "cipher", "is_fast"),
    [
        ("raw", "aes-256-xts", True),
        ("qcow2", "aes-256-xts", True),
        ("raw", "serpent-256-xts", False),
        ("qcow2", "twofish-256-xts", False),
    ],
)
def test_images_are_the_same_with_and_without_the_library(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_format: str,
    cipher: str,
    is_fast: bool,
) -> None:
    """Written and read with the library, in QEMU, and without."""
    plain, image, back = tmp_path / "plain", tmp_path / "image", tmp_path / "back"
    plain.write_bytes(random.Random(SEED).randbytes(SIZE))  # noqa: S311 -- repeatable
    formatting.make(image, DiskFormat(image_format), SIZE, [Volume(Cipher.parse(cipher), DEK)])
    with monkeypatch.context() as counted:
        count(counted, tmp_path)
        encrypt(plain, image, DiskFormat(image_format))
    assert used(tmp_path) == is_fast
    assert KeyedImage(image, image_format, DEK.passphrase).equals(plain)

    monkeypatch.setattr(acceleration, "LIBRARY", tmp_path / "absent")
    same = tmp_path / "same"
    same.write_bytes(image.read_bytes())
    encrypt(plain, same, DiskFormat(image_format))
    if image_format == "raw":
        assert same.read_bytes() == image.read_bytes()
    monkeypatch.undo()

    count(monkeypatch, tmp_path)
    with back.open("w+b") as file:
        conversion.decrypt_to(same, DiskFormat(image_format), file.fileno(), "raw", [DEK], lambda _: None)
    assert used(tmp_path) == is_fast
    assert back.read_bytes() == plain.read_bytes()


def count(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make confined tools of QEMU write the library's counts to ``statistics`` in *folder*."""
    variables = {**acceleration.environment(), "VIRT_SSE_XTS_STATISTICS": str(folder / "statistics")}
    monkeypatch.setattr(acceleration, "environment", lambda: variables)
    bound = ("--bind", str(folder), str(folder))
    monkeypatch.setattr(confinement, "_SYSTEM", (*confinement._SYSTEM, *bound))


def encrypt(plain: Path, image: Path, image_format: DiskFormat) -> None:
    with image_file.held(plain) as source:
        conversion.encrypt_from(plain, "raw", image, image_format, [DEK], lambda _: None, descriptor=source)


def used(folder: Path) -> bool:
    """Whether the sectors went through the fast path; if not, all went through the portable path."""
    *_, process = Statistics.read(folder / "statistics")
    (folder / "statistics").unlink()
    assert process.nettle == 0
    assert max(process.fast, process.portable) >= SIZE // SECTOR
    assert min(process.fast, process.portable) == 0
    return process.fast > 0


def test_cryptsetups_volume_key_decrypts_what_the_library_encrypted(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL decrypts each sector with the number of the sector as tweak (dm-crypt's plain64)."""
    plain, image = tmp_path / "plain", tmp_path / "image"
    content = random.Random(SEED).randbytes(1 << 20)  # noqa: S311 -- repeatable
    plain.write_bytes(content)
    formatting.make(image, DiskFormat.RAW, len(content), [Volume(AES_256_XTS, DEK)])
    count(monkeypatch, tmp_path)
    encrypt(plain, image, DiskFormat.RAW)
    (process,) = Statistics.read(tmp_path / "statistics")
    assert process.fast >= len(content) // SECTOR
    assert (process.portable, process.nettle) == (0, 0)
    cryptsetup("luksDump", "--dump-volume-key", "--volume-key-file", tmp_path / "key", image)
    volume_key = (tmp_path / "key").read_bytes()
    assert len(volume_key) == 64
    ciphertext = image.read_bytes()[-len(content) :]
    for number in range(len(content) // SECTOR):
        sector = slice(number * SECTOR, (number + 1) * SECTOR)
        mode = modes.XTS(number.to_bytes(16, "little"))
        decryptor = OpensslCipher(algorithms.AES(volume_key), mode).decryptor()
        assert decryptor.update(ciphertext[sector]) == content[sector]


def cryptsetup(command: str, *arguments: str | Path) -> None:
    subprocess.run(
        ["cryptsetup", command, "--batch-mode", "--key-file", "-", *arguments],
        input=DEK.passphrase,
        check=True,
    )
