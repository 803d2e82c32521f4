"""RSA-OAEP with a key in a token: entirely in the token, or raw RSA in the token and padding on the host."""

from __future__ import annotations

import enum
import secrets
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from PyKCS11 import (
    CKG_MGF1_SHA1,
    CKG_MGF1_SHA256,
    CKM_RSA_X_509,
    CKM_SHA256,
    CKM_SHA_1,
    Mechanism,
    PyKCS11Error,
    RSAOAEPMechanism,
)

from virt_sse.errors import InvalidValueError, KeyProviderUnavailableError
from virt_sse.pkcs11 import oaep, objects
from virt_sse.pkcs11.codes import MALFORMED, UNSUPPORTED, VAGUE
from virt_sse.pkcs11.objects import TokenKey

_RAW = Mechanism(CKM_RSA_X_509, None)
_HASHES: dict[str, tuple[type[hashes.HashAlgorithm], int, int]] = {
    "sha1": (hashes.SHA1, CKM_SHA_1, CKG_MGF1_SHA1),
    "sha256": (hashes.SHA256, CKM_SHA256, CKG_MGF1_SHA256),
}


class OaepMode(enum.Enum):
    """Place of the OAEP padding: token or host."""

    TOKEN = "token"  # noqa: S105 -- a word
    HOST = "host"


class RsaOaep:
    """RSA-OAEP in the mode supported by the token.

    The mode is probed once, with the first key: a token's list of mechanisms is not reliable.

    :ivar modes: mode by hash name, for hashes probed so far.
    """

    def __init__(self) -> None:
        self.modes: dict[str, OaepMode] = {}

    def encrypt(self, session: Any, handle: Any, key: TokenKey, message: bytes, hash_name: str) -> bytes:
        """Encrypt in the token if the mode allows and the token holds the public half; otherwise on the host.

        :raise PyKCS11Error: When the token fails.
        """
        mode = self._mode(session, handle, key, hash_name)
        if mode is OaepMode.TOKEN and message:  # PyKCS11 cannot pass an empty message
            for public in objects.public_handles(session, key.label, key.id):
                return bytes(session.encrypt(public, message, mechanism(hash_name)))
        return on_host(key, message, hash_name)

    def decrypt(
        self, session: Any, handle: Any, key: TokenKey, ciphertext: bytes, hash_name: str
    ) -> bytes | None:
        """Decrypt; ``None`` for any invalid ciphertext.

        :raise PyKCS11Error: When the token fails.
        """
        mode = self._mode(session, handle, key, hash_name)
        size = (key.bits + 7) // 8
        if len(ciphertext) != size or int.from_bytes(ciphertext, "big") >= (key.n or 0):
            return None
        if mode is OaepMode.HOST:
            return _raw(session, handle, ciphertext, size, hash_name)
        try:
            return bytes(session.decrypt(handle, ciphertext, mechanism(hash_name)))
        except PyKCS11Error as exc:
            if exc.value in MALFORMED:
                return None
            if exc.value not in VAGUE:
                raise
            # Bad ciphertext or broken token? A ciphertext known to be valid tells.
            session.decrypt(handle, on_host(key, bytes(16), hash_name), mechanism(hash_name))
            return None

    def _mode(self, session: Any, handle: Any, key: TokenKey, hash_name: str) -> OaepMode:
        if hash_name not in self.modes:
            self.modes[hash_name] = _try(session, handle, key, hash_name)
        return self.modes[hash_name]


def mechanism(hash_name: str) -> RSAOAEPMechanism:
    """PKCS#11 mechanism and parameters for OAEP with this hash."""
    _, hash_mechanism, mask = _algorithms(hash_name)
    return RSAOAEPMechanism(hash_mechanism, mask)


def on_host(key: TokenKey, message: bytes, hash_name: str) -> bytes:
    """Encrypt on the host, with the public half."""
    algorithm, _, _ = _algorithms(hash_name)
    return key.public_key.encrypt(message, padding.OAEP(padding.MGF1(algorithm()), algorithm(), label=None))


def _try(session: Any, handle: Any, key: TokenKey, hash_name: str) -> OaepMode:
    known = secrets.token_bytes(32)
    ciphertext = on_host(key, known, hash_name)
    try:
        if bytes(session.decrypt(handle, ciphertext, mechanism(hash_name))) == known:
            return OaepMode.TOKEN
    except PyKCS11Error as exc:
        if exc.value not in UNSUPPORTED | VAGUE | MALFORMED:
            raise
    if _raw(session, handle, ciphertext, len(ciphertext), hash_name) != known:
        raise KeyProviderUnavailableError("the token decrypts incorrectly")
    return OaepMode.HOST


def _raw(session: Any, handle: Any, ciphertext: bytes, size: int, hash_name: str) -> bytes | None:
    block = bytes(session.decrypt(handle, ciphertext, _RAW)).rjust(size, b"\0")
    return oaep.decode(block, hash_name)


def _algorithms(hash_name: str) -> tuple[type[hashes.HashAlgorithm], int, int]:
    if hash_name not in _HASHES:
        raise InvalidValueError(f"OAEP supports {' or '.join(_HASHES)}, not {hash_name!r}")
    return _HASHES[hash_name]
