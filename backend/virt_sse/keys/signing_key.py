"""The key with which a host signs deletion certificates."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from virt_sse.errors import HostKeyError
from virt_sse.keys.key_file import KeyFile

_KEY_BYTES = 32


class SigningKeyFile:
    """An Ed25519 key (RFC 8032): the 32 bytes of the private key, mode 0600. Never leaves the host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = KeyFile(path, "signing key")

    def provision(self) -> Ed25519PrivateKey:
        """The key, made at the first use.

        :raise HostKeyError: When the file cannot be written or read.
        """
        self._file.make(Ed25519PrivateKey.generate().private_bytes_raw())
        return self.load()

    def load(self) -> Ed25519PrivateKey:
        """The key.

        :raise HostKeyError: When there is no key, or the file cannot be read or is open to other users.
        """
        content = self._file.read()
        if content is None:
            raise HostKeyError(f"cannot read the signing key {self.path}: No such file or directory")
        if len(content) != _KEY_BYTES:
            raise HostKeyError(
                f"{self.path} is no signing key of {_KEY_BYTES} bytes",
                hint="restore the file from a backup, or remove it: the next certificate gets a new key",
            )
        return Ed25519PrivateKey.from_private_bytes(content)
