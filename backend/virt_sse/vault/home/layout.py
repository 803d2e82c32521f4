"""The folder of a vault, and the lock that limits the folder to one serving process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import VaultError
from virt_sse.system.database_url import sqlite_url
from virt_sse.system.files import PRIVATE_FILE, private_folder
from virt_sse.vault.home.settings import VaultSettings


@dataclass(frozen=True, slots=True)
class VaultDirectory:
    """A vault's folder, 0700; every file in it is 0600, every folder 0700."""

    path: Path

    @property
    def settings_path(self) -> Path:
        """The vault's settings, written last by ``vault init``: the file marks a complete vault."""
        return self.path / "vault.json"

    @property
    def unfinished_settings_path(self) -> Path:
        """The settings of a vault that ``vault init`` is making."""
        return self.path / "vault.json.unfinished"

    @property
    def root_key_path(self) -> Path:
        """The root key in the clear, unless sealed. Without either file all keys are lost."""
        return self.path / "root.key"

    @property
    def sealed_root_path(self) -> Path:
        """The root key, sealed by a key in a PKCS#11 token."""
        return self.path / "root.sealed"

    @property
    def sealing_path(self) -> Path:
        """The count of wrong PINs at the token that seals the root key."""
        return self.path / "sealing"

    @property
    def ca_path(self) -> Path:
        """The CA certificate, which clients trust."""
        return self.path / "ca.pem"

    @property
    def ca_key_path(self) -> Path:
        """The private key of the CA, which signs the server's certificates."""
        return self.path / "ca.key"

    @property
    def server_path(self) -> Path:
        """The server's certificate and private key."""
        return self.path / "server.pem"

    @property
    def database_path(self) -> Path:
        """The database of keys, principals and access, unless in PostgreSQL."""
        return self.path / "vault.sqlite"

    @property
    def hsm_path(self) -> Path:
        """The SoftHSM token of a premium vault, with its PIN, unless the vault uses an external HSM token."""
        return self.path / "hsm"

    @property
    def audit_path(self) -> Path:
        """The audit log."""
        return self.path / "audit.jsonl"

    @property
    def administrator_path(self) -> Path:
        """The first administrator's credential file."""
        return self.path / "administrator.json"

    def settings(self) -> VaultSettings:
        """Read the vault's settings.

        :raise VaultError: When there is no vault here, or other users can read its files.
        """
        self._check_private()
        return VaultSettings.from_json(self.read(self.settings_path))

    def unfinished_settings(self) -> VaultSettings | None:
        """Read the settings of an interrupted ``vault init``, if there was one."""
        path = self.unfinished_settings_path
        return VaultSettings.from_json(self.read(path)) if path.exists() else None

    def database_url(self, settings: VaultSettings) -> str:
        """The URL of the vault's database."""
        return settings.database or sqlite_url(self.database_path)

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Make the folder, unless it exists, and hold its lock while a vault is made in it.

        :raise VaultError: When the folder has a vault, or another process holds the lock.
        :raise OSError: When the folder cannot be made.
        """
        private_folder(self.path)
        with self.lock():
            if self.settings_path.exists():
                raise VaultError(f"{self.path} has a vault already")
            yield

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the folder's serving process, which has an SQLite database for itself.

        :raise VaultError: When another process holds the lock.
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

    def read(self, path: Path) -> bytes:
        """Read a file of the vault.

        :raise VaultError: When the file is missing or cannot be read.
        """
        try:
            return path.read_bytes()
        except FileNotFoundError as exc:
            raise VaultError(
                f"no vault in {self.path}" if path == self.settings_path else f"the vault lacks {path}",
                hint="'virt-sse vault init' creates a vault" if path == self.settings_path else None,
            ) from exc
        except OSError as exc:
            raise VaultError(f"cannot read {path}: {exc.strerror}") from exc

    def _check_private(self) -> None:
        if not self.settings_path.exists():
            return  # reading the settings raises the better error
        for path in (self.path, *sorted(self.path.iterdir())):
            status = path.stat()
            if status.st_uid != os.geteuid():
                raise VaultError(f"{path} belongs to another user")
            if status.st_mode & 0o077:
                raise VaultError(f"{path} is open to others", hint=f"chmod go= {path}")
