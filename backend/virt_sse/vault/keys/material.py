"""Key material: the backends for operations with private keys.

A :class:`Protection` makes and keeps keys of one Azure key type: ``RSA`` in software, here; ``RSA-HSM`` in an
HSM token. The bytes stored in the vault's database are sealed key material, or merely a handle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from virt_sse.errors import VaultError
from virt_sse.vault.home.sealing import Sealer
from virt_sse.vault.refusals import bad_parameter

KEY_SIZES = (2048, 3072, 4096)
PUBLIC_EXPONENT = 65537


def _oaep(algorithm: hashes.HashAlgorithm) -> padding.OAEP:
    return padding.OAEP(padding.MGF1(algorithm), algorithm, None)


_PADDINGS = {
    "RSA-OAEP": _oaep(hashes.SHA1()),  # noqa: S303 -- RFC 7518 §4.3; OAEP does not rest on collision resistance
    "RSA-OAEP-256": _oaep(hashes.SHA256()),
}
_HASH_BYTES = {"RSA-OAEP": 20, "RSA-OAEP-256": 32}
ALGORITHMS = frozenset(_PADDINGS)
"""Names of RFC 7518 §4.1, without RSA1_5, because of its padding oracle (RFC 8017 §7.2)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An RSA public key."""

    n: int
    e: int

    @property
    def bits(self) -> int:
        """The length of the modulus."""
        return self.n.bit_length()

    def encrypt(self, plaintext: bytes, algorithm: str) -> bytes:
        """Encrypt with RSA-OAEP.

        :raise Refusal: When *plaintext* is too long for the key.
        """
        longest = (self.bits + 7) // 8 - 2 * _HASH_BYTES[algorithm] - 2  # RFC 8017 §7.1.1
        if len(plaintext) > longest:
            raise bad_parameter(f"With this key {algorithm} takes at most {longest} bytes.")
        return rsa.RSAPublicNumbers(self.e, self.n).public_key().encrypt(plaintext, _PADDINGS[algorithm])


class KeyMaterial(ABC):
    """One version of a key, open for use. Thread-safe."""

    @property
    @abstractmethod
    def public(self) -> PublicKey:
        """The public key that belongs to the material."""

    @abstractmethod
    def decrypt(self, ciphertext: bytes, algorithm: str) -> bytes:
        """Decrypt *ciphertext*.

        :param algorithm: one of :data:`ALGORITHMS`.
        :raise Refusal: When decryption fails: the same response for every cause.
        """

    def require(self) -> None:  # noqa: B027 -- most kinds of material can always decrypt
        """Check that data encrypted with the public key now can be decrypted.

        :raise Refusal: When decryption is impossible.
        """


class Protection(ABC):
    """A protection backend: makes and keeps key material.

    Every method of a backend outside the database may raise :class:`~virt_sse.vault.refusals.Refusal`.

    :ivar key_type: Azure's ``kty`` of the backend's keys.
    :ivar outside: whether material is kept outside the vault's database, and so outlives a deleted row.
    """

    key_type: str
    outside = False

    @abstractmethod
    def generate(self, bits: int, name: str, version: str) -> tuple[PublicKey, bytes]:
        """Make a key, bound to its name and version.

        :return: the public key, and the bytes to store, for :meth:`open`.
        """

    @abstractmethod
    def import_key(self, private: rsa.RSAPrivateKey, name: str, version: str) -> tuple[PublicKey, bytes]:
        """Import a key; returns as :meth:`generate`."""

    @abstractmethod
    def open(self, stored: bytes, name: str, version: str) -> KeyMaterial:
        """Open a stored key.

        :raise VaultError: When *stored* is damaged or bound to another name or version.
        """

    def destroy(self, name: str, version: str) -> None:  # noqa: B027 -- material in the database goes with its row
        """Destroy a version's material outside the database, if there is any."""

    def require(self) -> None:  # noqa: B027 -- memory is always reachable
        """Check that material outside the database is reachable."""


def binding(name: str, version: str) -> bytes:
    """Build the authenticated context that binds stored material to a key's version."""
    return f"key\0{name}\0{version}".encode()


def private_key(numbers: rsa.RSAPrivateNumbers) -> rsa.RSAPrivateKey:
    """Build a private key from its numbers.

    :raise Refusal: When *numbers* are inconsistent, or the key is not of one of :data:`KEY_SIZES`.
    """
    if numbers.public_numbers.n.bit_length() not in KEY_SIZES:
        raise bad_parameter("An RSA key has 2048, 3072 or 4096 bits.")
    if numbers.public_numbers.e != PUBLIC_EXPONENT:
        raise bad_parameter(f"An RSA key has the public exponent {PUBLIC_EXPONENT}.")
    try:
        return numbers.private_key()
    except (ValueError, UnsupportedAlgorithm):
        raise bad_parameter("The numbers of the RSA key are inconsistent.") from None


@dataclass(frozen=True, slots=True, eq=False)
class _SoftwareKey(KeyMaterial):
    private: rsa.RSAPrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        numbers = self.private.public_key().public_numbers()
        return PublicKey(numbers.n, numbers.e)

    def decrypt(self, ciphertext: bytes, algorithm: str) -> bytes:
        try:
            return self.private.decrypt(ciphertext, _PADDINGS[algorithm])
        except ValueError:
            raise bad_parameter("The parameter is incorrect.") from None


class SoftwareProtection(Protection):
    """RSA keys in this process's memory; at rest, sealed under the root key."""

    key_type = "RSA"

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def generate(self, bits: int, name: str, version: str) -> tuple[PublicKey, bytes]:
        return self.import_key(rsa.generate_private_key(PUBLIC_EXPONENT, bits), name, version)

    def import_key(self, private: rsa.RSAPrivateKey, name: str, version: str) -> tuple[PublicKey, bytes]:
        numbers = private.public_key().public_numbers()
        der = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return PublicKey(numbers.n, numbers.e), self._sealer.seal(der, binding(name, version))

    def open(self, stored: bytes, name: str, version: str) -> KeyMaterial:
        # Validating the numbers takes up to 0.4 s; they were validated at import, and the seal protects them.
        private = load_der_private_key(
            self._sealer.open(stored, binding(name, version)), None, unsafe_skip_rsa_key_validation=True
        )
        if not isinstance(private, rsa.RSAPrivateKey):
            raise VaultError("a key of the vault is not an RSA key")
        return _SoftwareKey(private)
