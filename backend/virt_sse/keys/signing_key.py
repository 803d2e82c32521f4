"""The key with which a host signs deletion certificates."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from virt_sse.errors import HostKeyError
from virt_sse.system.files import private_folder, write_new

_OTHERS = 0o077
_KEY_BYTES = 32


class SigningKeyFile:
    """An Ed25519 key (RFC 8032): the 32 bytes of the private key, mode 0600. Never leaves the host."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def provision(self) -> Ed25519PrivateKey:
        """The key, made at the first use.

        :raise HostKeyError: When the file cannot be written or read.
        """
        if not self.path.exists():
            try:
                private_folder(self.path.parent)
                with contextlib.suppress(FileExistsError):  # another process made the key meanwhile
                    write_new(self.path, Ed25519PrivateKey.generate().private_bytes_raw())
            except OSError as exc:
                raise HostKeyError(f"cannot make the signing key {self.path}: {exc.strerror}") from exc
        return self.load()

    def load(self) -> Ed25519PrivateKey:
        """The key.

        :raise HostKeyError: When there is no key, or the file cannot be read or is open to other users.
        """
        try:
            with self.path.open("rb") as file:
                is_open_to_others = os.fstat(file.fileno()).st_mode & _OTHERS
                content = file.read(_KEY_BYTES + 1)
        except OSError as exc:
            raise HostKeyError(f"cannot read the signing key {self.path}: {exc.strerror}") from exc
        if is_open_to_others:
            raise HostKeyError(f"{self.path} is open to other users", hint=f"chmod 600 {self.path}")
        if len(content) != _KEY_BYTES:
            raise HostKeyError(
                f"{self.path} is no signing key of {_KEY_BYTES} bytes",
                hint="restore the file from a backup, or remove it: the next certificate gets a new key",
            )
        return Ed25519PrivateKey.from_private_bytes(content)
