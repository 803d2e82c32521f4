from __future__ import annotations

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.model.ciphers import AES_256_XTS, Cipher


@pytest.mark.parametrize("algorithm", ["aes-256", "serpent-256", "twofish-256"])
@pytest.mark.parametrize("mode", ["xts", "cbc-essiv:sha256"])
def test_every_cipher_reads_what_it_prints(algorithm: str, mode: str) -> None:
    text = f"{algorithm}-{mode}"
    assert str(Cipher.parse(text)) == text


def test_the_initial_vector_may_be_left_out() -> None:
    assert Cipher.parse("aes-256-cbc") == Cipher.parse("aes-256-cbc-essiv:sha256")


@pytest.mark.parametrize(
    "text", ["", "aes", "aes-256", "aes-128-xts", "AES-256-XTS", "aes-256-xts-plain64", "aes-256-ecb", "null"]
)
def test_an_unknown_cipher_is_refused_and_the_known_ones_listed(text: str) -> None:
    with pytest.raises(InvalidValueError, match="unknown cipher") as caught:
        Cipher.parse(text)
    assert "aes-256-xts" in (caught.value.hint or "")


def test_xts_is_named_as_by_qemu_and_cryptsetup() -> None:
    assert AES_256_XTS.cryptsetup == "aes-xts-plain64"
    assert AES_256_XTS.volume_key_bits == 512
    assert AES_256_XTS.qemu == {"cipher-alg": "aes-256", "cipher-mode": "xts", "ivgen-alg": "plain64"}


def test_cbc_is_named_as_by_qemu_and_cryptsetup() -> None:
    cipher = Cipher.parse("twofish-256-cbc")
    assert cipher.cryptsetup == "twofish-cbc-essiv:sha256"
    assert cipher.volume_key_bits == 256
    assert cipher.qemu == {
        "cipher-alg": "twofish-256",
        "cipher-mode": "cbc",
        "ivgen-alg": "essiv",
        "ivgen-hash-alg": "sha256",
    }
