"""The folder that a vault lives in, and the lock that makes one process its server."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import VaultError
from virt_sse.system.files import PRIVATE_FILE
from virt_sse.vault.home.sealing import VaultRootKey
from virt_sse.vault.home.settings import VaultSettings


@dataclass(frozen=True, slots=True)
class VaultDirectory:
    """A vault's folder, 0700; every file in it is 0600, every folder 0700."""

    path: Path

    @property
    def settings_path(self) -> Path:
        """Written last when the vault is made: where it is, the vault is whole."""
        return self.path / "vault.json"

    @property
    def root_key_path(self) -> Path:
        """The key that all keys lie under. Without it they are lost."""
        return self.path / "root.key"

    @property
    def ca_path(self) -> Path:
        """The certificate that clients trust."""
        return self.path / "ca.pem"

    @property
    def ca_key_path(self) -> Path:
        """What signs the server's certificates."""
        return self.path / "ca.key"

    @property
    def server_path(self) -> Path:
        """The server's certificate and its key."""
        return self.path / "server.pem"

    @property
    def database_path(self) -> Path:
        """Keys, principals and access."""
        return self.path / "vault.sqlite"

    @property
    def hsm_path(self) -> Path:
        """A premium vault's RSA-HSM keys, in a SoftHSM token with its PIN, if not in another one."""
        return self.path / "hsm"

    @property
    def audit_path(self) -> Path:
        """Every use of a key."""
        return self.path / "audit.jsonl"

    @property
    def administrator_path(self) -> Path:
        """The first administrator's credential file."""
        return self.path / "administrator.json"

    def settings(self) -> VaultSettings:
        """:raise VaultError: When there is no vault here, or its files are open to others."""
        self._check_private()
        return VaultSettings.from_json(self._read(self.settings_path))

    def root_key(self, settings: VaultSettings) -> VaultRootKey:
        """:raise VaultError: When it is missing or of a wrong length."""
        return VaultRootKey(self._read(self.root_key_path), f"{settings.tenant}/{settings.name}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that serves this vault: what it caches, nobody else changes.

        :raise VaultError: When another one does.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise VaultError(f"another process serves the vault in {self.path}") from exc
            yield
        finally:
            os.close(descriptor)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as exc:
            raise VaultError(
                f"no vault in {self.path}" if path == self.settings_path else f"the vault lacks {path}",
                hint="'virt-sse vault init' makes one" if path == self.settings_path else None,
            ) from exc
        except OSError as exc:
            raise VaultError(f"cannot read {path}: {exc.strerror}") from exc

    def _check_private(self) -> None:
        if not self.settings_path.exists():
            return  # reading it says so better
        for path in (self.path, *sorted(self.path.iterdir())):
            status = path.stat()
            if status.st_uid != os.geteuid():
                raise VaultError(f"{path} belongs to another user")
            if status.st_mode & 0o077:
                raise VaultError(f"{path} is open to others", hint=f"chmod go= {path}")
