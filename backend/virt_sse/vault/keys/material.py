"""Key material: who performs the operations that need a private key.

A :class:`Protection` makes and keeps keys of one type, as Azure names the types: ``RSA`` in software here; an
``RSA-HSM`` one keeps them in a token. What it hands the vault to store is sealed, or no more than a handle.
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
"""RFC 7518 §4.1's names. RSA1_5 is not among them: its padding oracle (RFC 8017 §7.2) has no place here."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An RSA public key."""

    n: int
    e: int

    @property
    def bits(self) -> int:
        """The modulus's length."""
        return self.n.bit_length()

    def encrypt(self, plaintext: bytes, algorithm: str) -> bytes:
        """:raise Refusal: When *plaintext* is longer than the key can take."""
        longest = (self.bits + 7) // 8 - 2 * _HASH_BYTES[algorithm] - 2  # RFC 8017 §7.1.1
        if len(plaintext) > longest:
            raise bad_parameter(f"With this key {algorithm} takes at most {longest} bytes.")
        return rsa.RSAPublicNumbers(self.e, self.n).public_key().encrypt(plaintext, _PADDINGS[algorithm])


class KeyMaterial(ABC):
    """One version of a key, open for use. Safe to use from several threads at once."""

    @abstractmethod
    def decrypt(self, ciphertext: bytes, algorithm: str) -> bytes:
        """What *ciphertext* holds.

        :param algorithm: one of :data:`ALGORITHMS`.
        :raise Refusal: When it was not made with this key and algorithm. One answer for every cause.
        """

    def require(self) -> None:  # noqa: B027 -- most have nothing to say
        """Make sure that what the public key encrypts now can be decrypted.

        :raise Refusal: When it cannot.
        """


class Protection(ABC):
    """Makes and keeps key material.

    Every method may raise :class:`~virt_sse.vault.refusals.Refusal` where the material lies outside.

    :ivar key_type: Azure's ``kty`` of its keys.
    :ivar outside: whether material lies outside the vault's database, and outlives a row that is deleted.
    """

    key_type: str
    outside = False

    @abstractmethod
    def generate(self, bits: int, name: str, version: str) -> tuple[PublicKey, bytes]:
        """A new key, bound to its name and version.

        :return: its public key, and what the vault stores in order to open it again.
        """

    @abstractmethod
    def import_key(self, private: rsa.RSAPrivateKey, name: str, version: str) -> tuple[PublicKey, bytes]:
        """A key that was made elsewhere."""

    @abstractmethod
    def open(self, stored: bytes, name: str, version: str) -> KeyMaterial:
        """The key that was stored so.

        :raise VaultError: When *stored* is damaged or was bound to something else.
        """

    def destroy(self, name: str, version: str) -> None:  # noqa: B027 -- what lies in the database goes with it
        """Destroy what lies outside of that version; nothing when there is none."""

    def require(self) -> None:  # noqa: B027 -- memory is always there
        """Make sure that what lies outside can be reached."""


def binding(name: str, version: str) -> bytes:
    """What stored material is bound to: it opens as this version of this key only."""
    return f"key\0{name}\0{version}".encode()


def private_key(numbers: rsa.RSAPrivateNumbers) -> rsa.RSAPrivateKey:
    """The key that *numbers* are of.

    :raise Refusal: When they do not fit together, or it is not one of :data:`KEY_SIZES`.
    """
    if numbers.public_numbers.n.bit_length() not in KEY_SIZES:
        raise bad_parameter("An RSA key has 2048, 3072 or 4096 bits.")
    if numbers.public_numbers.e != PUBLIC_EXPONENT:
        raise bad_parameter(f"An RSA key has the public exponent {PUBLIC_EXPONENT}.")
    try:
        return numbers.private_key()
    except (ValueError, UnsupportedAlgorithm):
        raise bad_parameter("The numbers of the RSA key do not fit together.") from None


@dataclass(frozen=True, slots=True, eq=False)
class _SoftwareKey(KeyMaterial):
    private: rsa.RSAPrivateKey = field(repr=False)

    def decrypt(self, ciphertext: bytes, algorithm: str) -> bytes:
        try:
            return self.private.decrypt(ciphertext, _PADDINGS[algorithm])
        except ValueError:
            raise bad_parameter("The parameter is incorrect.") from None


class SoftwareProtection(Protection):
    """RSA keys in this process's memory, sealed under the root key at rest."""

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
        # Its numbers were checked when it came, which takes up to 0.4 s; the seal says that it is the same.
        private = load_der_private_key(
            self._sealer.open(stored, binding(name, version)), None, unsafe_skip_rsa_key_validation=True
        )
        if not isinstance(private, rsa.RSAPrivateKey):
            raise VaultError("a key of the vault is no RSA key")
        return _SoftwareKey(private)
