"""OAEP decoding on the host, against what pyca/cryptography encodes."""

from __future__ import annotations

import secrets

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from virt_sse.pkcs11 import oaep

KEY = rsa.generate_private_key(65537, 2048)
HASHES: dict[str, type[hashes.HashAlgorithm]] = {"sha1": hashes.SHA1, "sha256": hashes.SHA256}


def block_of(message: bytes, hash_name: str) -> bytes:
    """What RSA alone makes of a ciphertext."""
    algorithm = HASHES[hash_name]()
    ciphertext = KEY.public_key().encrypt(
        message, padding.OAEP(padding.MGF1(algorithm), algorithm, label=None)
    )
    numbers = KEY.private_numbers()
    return pow(int.from_bytes(ciphertext, "big"), numbers.d, numbers.public_numbers.n).to_bytes(256, "big")


def encoded(data_block: bytes, *, first: bytes = b"\0", hash_name: str = "sha256") -> bytes:
    """A block around *data_block*, masked as it should be."""
    seed = secrets.token_bytes(HASHES[hash_name]().digest_size)
    masked = bytes(
        a ^ b for a, b in zip(data_block, oaep.mask(seed, len(data_block), hash_name), strict=True)
    )
    masked_seed = bytes(a ^ b for a, b in zip(seed, oaep.mask(masked, len(seed), hash_name), strict=True))
    return first + masked_seed + masked


def label_hash() -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    return digest.finalize()


@pytest.mark.parametrize("hash_name", HASHES)
@pytest.mark.parametrize("length", [0, 1, 32, 64, 190])
def test_an_encoded_message_decodes_to_itself(hash_name: str, length: int) -> None:
    message = secrets.token_bytes(length)
    assert oaep.decode(block_of(message, hash_name), hash_name) == message


@pytest.mark.parametrize("message", [bytes(64), b"\1" * 64, b"\0\1" * 32])
def test_messages_that_look_like_padding_decode_to_themselves(message: bytes) -> None:
    assert oaep.decode(block_of(message, "sha256"), "sha256") == message


def test_a_block_under_the_other_hash_is_refused() -> None:
    assert oaep.decode(block_of(b"x" * 64, "sha1"), "sha256") is None
    assert oaep.decode(block_of(b"x" * 64, "sha256"), "sha1") is None


def test_a_block_with_any_flipped_byte_is_refused() -> None:
    block = block_of(b"x" * 64, "sha256")
    for position in range(len(block)):
        flipped = bytearray(block)
        flipped[position] ^= 1 << position % 8
        assert oaep.decode(bytes(flipped), "sha256") is None


def test_each_part_of_the_padding_counts() -> None:
    good = label_hash() + bytes(126) + b"\1" + b"x" * 64
    assert oaep.decode(encoded(good), "sha256") == b"x" * 64
    assert oaep.decode(encoded(good, first=b"\1"), "sha256") is None
    assert oaep.decode(encoded(bytes(32) + good[32:]), "sha256") is None
    assert oaep.decode(encoded(label_hash() + bytes(125) + b"\2\1" + b"x" * 64), "sha256") is None
    assert oaep.decode(encoded(label_hash() + bytes(191)), "sha256") is None


@pytest.mark.parametrize("length", [0, 1, 65])
def test_a_block_that_is_too_short_is_refused(length: int) -> None:
    assert oaep.decode(bytes(length), "sha256") is None
