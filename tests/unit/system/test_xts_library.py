"""``libvirt_sse_xts.so`` ciphers as nettle and OpenSSL do, on each path."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from support.folders import REPOSITORY
from support.nettle_xts import Message, process
from virt_sse.system import acceleration

LENGTHS = (16, 32, 48, 112, 128, 144, 240, 256, 496, 512, 528, 1024, 1552, 4096, 4112, 8192)
STOLEN = (17, 31, 100, 513, 4095)
"""Lengths for ciphertext stealing, which nettle does itself."""
SEED = 20


@pytest.fixture
def library() -> Path:
    found = acceleration.library()
    if found is None:
        pytest.skip(f"the XTS library: {acceleration.obstacle()}")
    return found


def available(library: Path, folder: Path, path: str) -> None:
    _, statistics = process(library, [], folder, path=path)
    if statistics.path != path:
        pytest.skip(f"the processor has no {path}")


@cache
def messages() -> list[Message]:
    """AES with each length, key size, direction and alignment; tweaks whose doubling carries."""
    chosen = random.Random(SEED)  # noqa: S311 -- repeatable
    found = []
    for length in LENGTHS + STOLEN:
        for cipher, key_bytes in (("aes128", 32), ("aes256", 64)):
            for encrypt in (True, False):
                for through_wrappers in (True, False):
                    found.append(
                        Message(
                            cipher,
                            chosen.randbytes(key_bytes).hex(),
                            chosen.choice([b"\xff" * 16, bytes(16), chosen.randbytes(16)]).hex(),
                            chosen.randbytes(length).hex(),
                            encrypt=encrypt,
                            in_place=chosen.random() < 0.5,
                            offset=chosen.choice([0, 0, 1, 3, 8, 16, 31]),
                            through_wrappers=through_wrappers,
                        )
                    )
    return found


def by_openssl(message: Message) -> bytes:
    cipher = Cipher(algorithms.AES(bytes.fromhex(message.key)), modes.XTS(bytes.fromhex(message.tweak)))
    run = cipher.encryptor() if message.encrypt else cipher.decryptor()
    return run.update(bytes.fromhex(message.data)) + run.finalize()


@pytest.mark.parametrize("path", ["nettle", "portable", "aesni", "vaes256", "vaes512"])
def test_aes_is_the_same_as_openssls(library: Path, tmp_path: Path, path: str) -> None:
    available(library, tmp_path, path)
    results, statistics = process(library, messages(), tmp_path, path=path)
    for message, result in zip(messages(), results, strict=True):
        assert result == by_openssl(message), message
    stolen = len(messages()) * len(STOLEN) // len(LENGTHS + STOLEN)
    whole = len(messages()) - stolen
    if path == "nettle":
        assert statistics.nettle == len(messages())
    elif path == "portable":
        assert (statistics.fast, statistics.portable, statistics.nettle) == (0, whole, stolen)
    else:
        assert (statistics.fast, statistics.portable, statistics.nettle) == (whole, 0, stolen)


@pytest.mark.parametrize("cipher", ["serpent", "twofish"])
def test_other_ciphers_take_the_portable_path(library: Path, tmp_path: Path, cipher: str) -> None:
    chosen = random.Random(SEED)  # noqa: S311 -- repeatable
    asked = [
        Message(
            cipher,
            chosen.randbytes(64).hex(),
            chosen.randbytes(16).hex(),
            chosen.randbytes(length).hex(),
            encrypt=encrypt,
            in_place=in_place,
        )
        for length in (16, 48, 512, 4096, 4112, 8192)
        for encrypt in (True, False)
        for in_place in (True, False)
    ]
    results, statistics = process(library, asked, tmp_path)
    expected, _ = process(library, asked, tmp_path, path="nettle")
    assert results == expected
    assert (statistics.fast, statistics.portable, statistics.nettle) == (0, len(asked), 0)


def test_a_nettle_that_is_loaded_later_does_the_work(library: Path, tmp_path: Path) -> None:
    results, statistics = process(library, messages(), tmp_path, late=True)
    assert results == [by_openssl(message) for message in messages()]
    assert (statistics.path, statistics.nettle) == ("nettle", len(messages()))


def test_no_other_interface_of_nettle_is_replaced(library: Path) -> None:
    handle = ctypes.CDLL(str(library))._handle
    find = ctypes.CDLL(None).dlvsym
    find.restype, find.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    for name in (b"nettle_xts_encrypt_message", b"nettle_xts_decrypt_message"):
        assert find(handle, name, b"NETTLE_8")
        assert not find(handle, name, b"NETTLE_9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong", "path"),
    [
        ("kernel.h", "SHIFT_RIGHT(tweak, 16 - LANES)", "SHIFT_RIGHT(tweak, 15)", "aesni portable"),
        ("kernel.h", "ENC_LAST(state[i]", "ENC(state[i]", "portable"),
        ("xts.c", "0x87 & -carry", "0x86 & -carry", "nettle"),
        ("xts.c", "0x69, 0xc4, 0xe0", "0x69, 0xc4, 0xe1", "nettle"),
    ],
)
def test_a_path_that_fails_its_self_test_is_not_used(
    tmp_path: Path, file: str, right: str, wrong: str, path: str
) -> None:
    """The library, built with a fault, still gives right results, on a slower path."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    source = shutil.copytree(REPOSITORY / "backend/libvirt_sse_xts", tmp_path / "source")
    content = (source / file).read_text()
    assert content.count(right) == 1
    (source / file).write_text(content.replace(right, wrong))
    broken = tmp_path / "broken.so"
    options = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    options += [f"-Wl,--version-script={source / 'nettle_8.map'}"]
    subprocess.run(["gcc", *options, "-o", broken, source / "xts.c"], check=True)
    results, statistics = process(broken, messages(), tmp_path)
    assert statistics.path in path.split()
    assert results == [by_openssl(message) for message in messages()]


def test_threads_do_not_disturb_each_other(library: Path, tmp_path: Path) -> None:
    results, statistics = process(library, messages(), tmp_path, threads=4)
    assert results == [by_openssl(message) for message in messages()]
    assert statistics.fast + statistics.portable + statistics.nettle == 4 * len(messages())
