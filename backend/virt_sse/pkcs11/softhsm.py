"""SoftHSM: a token in files, for labs and trials."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PyKCS11 import (
    CKF_RW_SESSION,
    CKF_TOKEN_INITIALIZED,
    CKF_USER_PIN_INITIALIZED,
    CKU_SO,
    PyKCS11Error,
)

from virt_sse.errors import ConfigError, InvalidValueError, KeyProviderUnavailableError
from virt_sse.pkcs11.module import Module, find_module, load
from virt_sse.pkcs11.pins import Pin, PinGuard, PinSource
from virt_sse.pkcs11.process import ModuleProcess
from virt_sse.pkcs11.token import SECONDS, Token
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.system.files import private_folder, sync_folder, write_at, write_private

VARIABLE = "SOFTHSM2_CONF"
MODULE_NAME = "softhsm2"
_PIN_BYTES = 16
_LONGEST_LABEL = 32
_TOKEN_OBJECT = "token.object"  # noqa: S105 -- the name of a file
_CONFIG = """\
directories.tokendir = {tokens}
objectstore.backend = file
objectstore.umask = 0077
log.level = ERROR
slots.removable = false
"""


@dataclass(frozen=True, slots=True)
class TokenFolder:
    """Folder of a SoftHSM token, its configuration and its PINs.

    A token is made in the subfolder ``new``, and moved when complete; the file ``new/uri`` marks it as
    complete. An incomplete token in ``new`` was never used.

    SoftHSM rewrites the file ``token.object`` in place at each login. If killed during the write, SoftHSM
    leaves an empty file, and the keys would be lost. Therefore a copy is kept.
    """

    path: Path

    @property
    def config(self) -> Path:
        """SoftHSM's configuration."""
        return self.path / "softhsm2.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for SoftHSM to find its configuration."""
        return {VARIABLE: str(self.config.absolute())}

    @property
    def tokens(self) -> Path:
        """Folder of the token's content, encrypted under its PINs."""
        return self.path / "tokens"

    @property
    def pin(self) -> Path:
        """File with the user PIN."""
        return self.path / "pin"

    @property
    def so_pin(self) -> Path:
        """File with the PIN of the security officer; the officer can set a new user PIN but not use keys."""
        return self.path / "so-pin"

    @property
    def uri(self) -> Path:
        """File with the token's URI, including its serial."""
        return self.path / "uri"

    @property
    def wrong_pins(self) -> Path:
        """File for :class:`PinGuard`."""
        return self.path / "wrong-pins"

    @property
    def spare(self) -> Path:
        """Copy of ``token.object``; its secrets are encrypted under the PINs."""
        return self.path / "token.object"

    def read_uri(self) -> TokenUri:
        """Read the token's URI.

        :raise ConfigError: When the folder has no token, or the file cannot be read.
        """
        try:
            return TokenUri.parse(self.uri.read_text("utf-8").strip())
        except FileNotFoundError as exc:
            raise ConfigError(
                f"no token in {self.path}",
                hint="make a token with 'virt-sse host hsm init', or name another token by its 'uri'",
            ) from exc
        except (OSError, UnicodeDecodeError, InvalidValueError) as exc:
            raise ConfigError(f"cannot read {self.uri}: {exc}") from exc

    def write_config(self, tokens: Path | None = None) -> None:
        """Make the folder and SoftHSM's configuration.

        :param tokens: temporary location of the tokens, while a token is being made.
        """
        private_folder(self.path)
        for stray in self.path.glob(f".{self.config.name}.*"):  # left by a killed writer
            stray.unlink()
        tokens = private_folder(tokens or self.tokens)
        write_private(self.config, _CONFIG.format(tokens=tokens.absolute()).encode())

    def initialise(self, label: str) -> bool:
        """Make the token if it does not exist.

        Completes an interrupted earlier call, and repairs a token damaged by a killed login.

        :return: whether the token was made.
        :raise ConfigError: When SoftHSM is not installed, or the folder cannot be written.
        :raise KeyProviderUnavailableError: When an existing token cannot be opened; an existing token is
            never replaced.
        """
        new = TokenFolder(self.path / "new")
        try:
            is_new = not self.uri.exists()
            if is_new:
                if not new.uri.exists():
                    self._make(new, label)
                self._move(new)
            else:
                self._mend()
            self.open().close()
        except OSError as exc:
            raise ConfigError(f"cannot make a token in {self.path}: {exc.strerror}") from exc
        return is_new

    def _make(self, new: TokenFolder, label: str) -> None:
        if self.tokens.exists():
            raise ConfigError(
                f"tokens exist in {self.tokens}, but the file {self.uri} with the token's URI is missing",
                hint="restore the file from a backup, or move the tokens away",
            )
        if new.path.exists():
            shutil.rmtree(new.path)
        self.write_config(private_folder(new.path) / new.tokens.name)
        for path in (new.pin, new.so_pin):
            write_private(path, secrets.token_hex(_PIN_BYTES).encode() + b"\n")
        pins = (PinSource.file(new.so_pin).read(), PinSource.file(new.pin).read())
        serial = init_token(find_module(MODULE_NAME), self.environment, label, so_pin=pins[0], pin=pins[1])
        (made,) = new.tokens.glob(f"*/{_TOKEN_OBJECT}")
        write_private(new.spare, made.read_bytes())
        write_private(new.uri, f"{TokenUri(token=label, serial=serial)}\n".encode())

    def _move(self, new: TokenFolder) -> None:
        for source, target in (
            (new.tokens, self.tokens),
            (new.pin, self.pin),
            (new.so_pin, self.so_pin),
            (new.spare, self.spare),
        ):
            if source.exists():
                source.rename(target)
        self.write_config()
        PinGuard(self.wrong_pins).reset()
        new.uri.rename(self.uri)
        sync_folder(self.path)
        new.path.rmdir()

    def _mend(self) -> None:
        """Restore a torn ``token.object`` from the copy."""
        for path in self.tokens.glob(f"*/{_TOKEN_OBJECT}"):
            with path.open("r+b") as file, path.with_name("token.lock").open("wb") as lock:
                for each in (lock, file):  # SoftHSM's own locks: another process may be writing the file
                    fcntl.lockf(each, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_size == 0 and self.spare.exists():
                    write_at(file.fileno(), self.spare.read_bytes(), 0)
                    os.fsync(file.fileno())

    def open(self) -> Token:
        """Open the token in this folder.

        :raise: As :meth:`Token.open` and :meth:`read_uri`.
        """
        return Token.open(
            self.read_uri(),
            find_module(MODULE_NAME),
            PinSource.file(self.pin),
            guard=PinGuard(self.wrong_pins),
            environment=self.environment,
        )


def init_token(module: Path, environment: Mapping[str, str], label: str, *, so_pin: Pin, pin: Pin) -> str:
    """Make a token in a free slot, or complete an interrupted earlier call; returns the token's serial.

    :param environment: environment variables of the module's process.
    :raise InvalidValueError: When the label is invalid.
    :raise KeyProviderUnavailableError: When there is no free slot, or the module fails.
    """
    if not 0 < len(label.encode()) <= _LONGEST_LABEL or not label.isprintable():
        raise InvalidValueError(f"a token's label must have 1 to {_LONGEST_LABEL} printable bytes")
    process = ModuleProcess(load, module, None, environment=environment, seconds=SECONDS)
    with contextlib.closing(process):
        return process.call(SECONDS, _init_token, label, so_pin.text, pin.text)


def _init_token(module: Module, label: str, so_pin: str, pin: str) -> str:
    try:
        library = module.library
        slot, is_made = _slot(library, label)
        if not is_made:
            padding = " " * (_LONGEST_LABEL - len(label.encode()))
            library.initToken(slot, so_pin, label + padding)
        if not library.getTokenInfo(slot).flags & CKF_USER_PIN_INITIALIZED:
            with _security_officer(library, slot, so_pin) as session:
                session.initPin(pin)
        return str(library.getTokenInfo(slot).serialNumber).rstrip("\0 ")
    except PyKCS11Error as exc:
        raise KeyProviderUnavailableError(f"cannot make token {label!r}: {exc}") from exc


def _slot(library: Any, label: str) -> tuple[int, bool]:
    """Slot of the token or a free slot, and whether the token exists."""
    free: list[int] = []
    for slot in library.getSlotList(True):
        info = library.getTokenInfo(slot)
        if not info.flags & CKF_TOKEN_INITIALIZED:
            free.append(slot)
        elif str(info.label).rstrip("\0 ") == label:
            return slot, True
    if not free:
        raise KeyProviderUnavailableError("the module has no slot for another token")
    return free[0], False


@contextlib.contextmanager
def _security_officer(library: Any, slot: int, so_pin: str) -> Iterator[Any]:
    session = library.openSession(slot, CKF_RW_SESSION)
    try:
        session.login(so_pin, CKU_SO)
        yield session
    finally:
        with contextlib.suppress(PyKCS11Error):
            session.logout()
        session.closeSession()
