"""What the instances of a vault share outside of the database, as one encrypted file.

The file has the vault's settings, its root key, and its CA with the private key. The file is encrypted under
a passphrase or for a recipient; ``backend/docs/formats.md`` describes the format.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from virt_sse.errors import CredentialError, InvalidValueError, VaultError
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import write_new, write_private
from virt_sse.vault.home.certificates import new_server_certificate
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import Sealer, VaultRootKey
from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.hsm.sealed_root import SealedRoot, SealingKey, unseal
from virt_sse.vault.root_key import (
    check_root_key,
    forget_wrong_pins,
    is_sealed,
    reached_by,
    read_root_key,
    write_sealed,
)
from virt_sse.vault_client.secret_files import read_secret_file

SHORTEST_PASSPHRASE = 12

_CONTEXT = b"virt-sse vault root v1\0"
_KEY_BYTES, _SALT_BYTES = 32, 16
_SCRYPT_COST, _SCRYPT_BLOCK = 1 << 17, 8
_LONGEST_FILE = 1 << 20
_KEY_PAIR = "openssl genpkey -algorithm X25519 -out KEY; openssl pkey -in KEY -pubout -out RECIPIENT"


class _File(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag_field="format",
    tag="virt-sse-vault-root-1",
):
    """The file.

    :ivar vault: the vault's URL, for the reader.
    :ivar lock: what the key is derived from, beside the secret: ``passphrase`` or ``recipient``.
    :ivar salt: of scrypt, or the ephemeral public key (raw X25519).
    """

    vault: str
    lock: str
    salt: bytes
    sealed: bytes

    def context(self) -> bytes:
        """What the encryption authenticates."""
        return _CONTEXT + b"\0".join((self.lock.encode(), self.vault.encode(), self.salt))


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Either ``root_key`` or ``sealed_root``, the file ``root.sealed``."""

    settings: bytes
    ca: str
    ca_key: str
    root_key: bytes | None = None
    sealed_root: bytes | None = None

    def __post_init__(self) -> None:
        if (self.root_key is None) == (self.sealed_root is None):
            raise ValueError("an export has the root key or the sealed root key")

    def __repr__(self) -> str:
        return "_Content()"


class Secret(Protocol):
    """A secret that encrypts or decrypts exports."""

    lock: str

    def new(self) -> tuple[bytes, bytes]:
        """A new salt, and the key derived from the salt."""

    def derived(self, salt: bytes) -> bytes:
        """The key of an existing export.

        :raise ValueError: When *salt* is malformed.
        """


@dataclass(frozen=True, slots=True)
class Passphrase:
    """A passphrase, at least :data:`SHORTEST_PASSPHRASE` characters long."""

    text: str = field(repr=False)
    lock = "passphrase"

    def __post_init__(self) -> None:
        if len(self.text) < SHORTEST_PASSPHRASE:
            raise InvalidValueError(f"a passphrase needs at least {SHORTEST_PASSPHRASE} characters")

    @classmethod
    def read(cls, path: Path) -> Passphrase:
        """Read the first line of *path*.

        :raise CredentialError: When the file cannot be read, or is open to other users.
        :raise InvalidValueError: When the passphrase is too short, or not UTF-8.
        """
        try:
            lines = read_secret_file(path, "passphrase file").decode().splitlines()
        except UnicodeDecodeError:
            raise InvalidValueError(f"the passphrase file {path} is not in UTF-8") from None
        return cls(lines[0] if lines else "")

    def new(self) -> tuple[bytes, bytes]:
        salt = secrets.token_bytes(_SALT_BYTES)
        return salt, self.derived(salt)

    def derived(self, salt: bytes) -> bytes:
        return Scrypt(salt, _KEY_BYTES, _SCRYPT_COST, _SCRYPT_BLOCK, 1).derive(self.text.encode())


@dataclass(frozen=True, slots=True)
class Recipient:
    """A recipient's key pair (X25519); the private key is needed for decryption alone."""

    public: X25519PublicKey
    private: X25519PrivateKey | None = field(default=None, repr=False)
    lock = "recipient"

    @classmethod
    def new_key_pair(cls) -> Recipient:
        """Make a key pair."""
        key = X25519PrivateKey.generate()
        return cls(key.public_key(), key)

    @classmethod
    def read_public(cls, path: Path) -> Recipient:
        """Read a public key in PEM.

        :raise InvalidValueError: When the file cannot be read, or has no such key.
        """
        try:
            key = load_pem_public_key(path.read_bytes())
        except OSError as exc:
            raise InvalidValueError(f"cannot read the recipient {path}: {exc.strerror}") from exc
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, X25519PublicKey):
            raise InvalidValueError(f"{path} is no public X25519 key in PEM", hint=_KEY_PAIR)
        return cls(key)

    @classmethod
    def read_private(cls, path: Path) -> Recipient:
        """Read a private key in PEM, without a passphrase.

        :raise CredentialError: When the file cannot be read, is open to other users, or has no such key.
        """
        try:
            key = load_pem_private_key(read_secret_file(path, "private key"), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, X25519PrivateKey):
            raise CredentialError(f"{path} is no private X25519 key in PEM without a passphrase")
        return cls(key.public_key(), key)

    def new(self) -> tuple[bytes, bytes]:
        ephemeral = X25519PrivateKey.generate()
        salt = ephemeral.public_key().public_bytes_raw()
        return salt, self._key(ephemeral.exchange(self.public), salt)

    def derived(self, salt: bytes) -> bytes:
        if self.private is None:
            raise ValueError("decryption needs the private key")
        return self._key(self.private.exchange(X25519PublicKey.from_public_bytes(salt)), salt)

    def _key(self, shared: bytes, salt: bytes) -> bytes:
        info = _CONTEXT + salt + self.public.public_bytes_raw()
        return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=info).derive(shared)


def export_root(directory: VaultDirectory, file: Path, secret: Secret, *, unsealed: bool = False) -> None:
    """Write what a further instance needs to the new file *file*, mode 0600, encrypted.

    A sealed root key is exported sealed: the further instance needs the token.

    :param unsealed: unseal the root key through the token, and export the root key itself.
    :raise VaultError: When there is no vault, *file* exists, a file cannot be read or written, or the token
        does not unseal the root key.
    """
    settings = directory.settings()
    try:
        as_sealed = is_sealed(directory) and not unsealed
        content = _Content(
            settings=settings.to_json(),
            root_key=None if as_sealed else read_root_key(directory, settings).material,
            sealed_root=directory.read(directory.sealed_root_path) if as_sealed else None,
            ca=directory.ca_path.read_text("ascii"),
            ca_key=directory.ca_key_path.read_text("ascii"),
        )
        salt, key = secret.new()
        header = _File(settings.url, secret.lock, salt, b"")
        sealed = Sealer(AESGCM(key)).seal(msgspec.json.encode(content), header.context())
        document = msgspec.json.encode(msgspec.structs.replace(header, sealed=sealed))
        write_new(file, msgspec.json.format(document, indent=2) + b"\n")
    except OSError as exc:
        raise VaultError(f"cannot export the vault's root key to {file}: {exc.strerror}") from exc


def import_root(
    file: Path,
    path: Path,
    secret: Secret,
    *,
    hosts: Sequence[str] = (),
    database: str | None = None,
    sealed_by: SealingKey | None = None,
) -> VaultDirectory:
    """Make an instance of an existing vault in the folder *path*, from an export.

    :param hosts: further names and addresses for this instance's certificate.
    :param database: the URL of the vault's database from here, if it differs.
    :param sealed_by: a key in a PKCS#11 token that seals the root key here. For an export with a sealed root
        key, the same key, whose token is reached as this says.
    :raise VaultError: When *file* is no export or *secret* does not open *file*, the folder has a vault
        already, the database is not the vault's, the token does not seal or unseal the root key, or a file
        cannot be read or written.
    :raise InvalidValueError: When a host or the URL is invalid.
    """
    content = _opened(file, secret)
    settings = VaultSettings.from_json(content.settings)
    if database is not None and settings.database is None:
        raise InvalidValueError("the database of this vault is in SQLite, and cannot be elsewhere")
    settings = msgspec.structs.replace(
        settings,
        hosts=tuple(dict.fromkeys((*settings.hosts, *hosts))),
        database=database or settings.database,
    )
    directory = VaultDirectory(path)
    try:
        with directory.making():
            _import_root_key(content, directory, settings, sealed_by)
            ca, ca_key = content.ca.encode("ascii"), content.ca_key.encode("ascii")
            write_private(directory.ca_key_path, ca_key)
            write_private(directory.ca_path, ca)
            write_private(directory.server_path, new_server_certificate(ca, ca_key, settings.hosts))
            write_private(directory.settings_path, settings.to_json())
    except OSError as exc:
        raise VaultError(f"cannot make an instance of the vault in {path}: {exc.strerror}") from exc
    return directory


def _opened(file: Path, secret: Secret) -> _Content:
    try:
        with file.open("rb") as opened:
            document = from_json(opened.read(_LONGEST_FILE), _File)
    except OSError as exc:
        raise VaultError(f"cannot read {file}: {exc.strerror}") from exc
    except DocumentError as exc:
        raise VaultError(f"{file} is no export of a vault's root key: {exc}") from exc
    if document.lock != secret.lock:
        expected = "for a recipient, not under a passphrase"
        if secret.lock == "recipient":
            expected = "under a passphrase, not for a recipient"
        raise VaultError(f"{file} is encrypted {expected}")
    try:
        plaintext = Sealer(AESGCM(secret.derived(document.salt))).open(document.sealed, document.context())
        return from_json(plaintext, _Content)
    except (VaultError, ValueError, DocumentError) as exc:
        raise VaultError(f"cannot decrypt {file}: another {secret.lock}, or an altered file") from exc


def _import_root_key(
    content: _Content, directory: VaultDirectory, settings: VaultSettings, sealed_by: SealingKey | None
) -> None:
    """Write the root key of a new instance once the root key is proved to be the database's."""
    if content.sealed_root is not None:
        sealed = SealedRoot.from_json(content.sealed_root)
        if sealed_by is not None:
            sealed = reached_by(sealed, sealed_by)
            forget_wrong_pins(directory, sealed_by)
        root = unseal(sealed, settings.identity, directory.sealing_path)
    else:
        root = VaultRootKey(content.root_key or b"", settings.identity)
    if settings.database is not None:
        check_root_key(settings.database, root)
    for path in (directory.root_key_path, directory.sealed_root_path):
        path.unlink(missing_ok=True)  # of a killed import
    if content.sealed_root is not None:
        write_private(directory.sealed_root_path, sealed.to_json())
    elif sealed_by is not None:
        write_sealed(directory, root, sealed_by)
    else:
        write_private(directory.root_key_path, root.material)
