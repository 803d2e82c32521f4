"""OAEP decoding for tokens with raw RSA but without the OAEP hash (RFC 8017 §7.1.2, step 3)."""

from __future__ import annotations

import hashlib
import hmac


def decode(block: bytes, hash_name: str) -> bytes | None:
    """Decode the message of *block*, or ``None`` when decoding fails. The label is empty.

    All checks run on all bytes before a decision, and a failure does not tell its cause: otherwise an
    attacker who submits ciphertexts can decrypt by trial (Manger's attack, RFC 8017 §7.1.2, note).

    :param block: RSA decryption of a ciphertext, as long as the modulus.
    """
    label_hash = hashlib.new(hash_name, b"").digest()
    size = len(label_hash)
    if len(block) < 2 * size + 2:
        return None
    masked_seed, masked_data = block[1 : 1 + size], block[1 + size :]
    seed = _xor(masked_seed, mask(masked_data, size, hash_name))
    data = _xor(masked_data, mask(seed, len(masked_data), hash_name))

    is_good = int(hmac.compare_digest(block[:1], b"\0")) & int(hmac.compare_digest(data[:size], label_hash))
    start, is_found = 0, 0
    for position in range(size, len(data)):
        byte = data[position]
        is_one = ((byte ^ 1) - 1) >> 8 & 1
        is_zero = (byte - 1) >> 8 & 1
        is_here = is_one & (1 - is_found)
        start += is_here * (position + 1)
        is_good &= is_found | is_one | is_zero
        is_found |= is_one
    message = data[start:]
    return message if is_good & is_found else None


def mask(seed: bytes, length: int, hash_name: str) -> bytes:
    """MGF1 (RFC 8017 appendix B.2.1); returns *length* bytes."""
    made = bytearray()
    counter = 0
    while len(made) < length:
        made += hashlib.new(hash_name, seed + counter.to_bytes(4, "big")).digest()
        counter += 1
    return bytes(made[:length])


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
