"""Throw-away PKCS#11 tokens: SoftHSM's, and NSS's own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from virt_sse.errors import ConfigError, LabUnavailableError
from virt_sse.lab import directories
from virt_sse.lab.directories import OwnedDirectory
from virt_sse.pkcs11.module import Module, find_module, load
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.pins import PinSource
from virt_sse.pkcs11.process import ModuleProcess
from virt_sse.pkcs11.softhsm import MODULE_NAME, TokenFolder, init_token
from virt_sse.pkcs11.token import SECONDS, Token
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.system.files import private_folder, write_private

_NSS_MODULE_NAME = "softokn3"
_NSS_ROUNDS = "NSS_MAX_MP_PBE_ITERATION_COUNT"
_NSS_SLOT = 2
"""Slot of NSS's key database; the other slot is empty."""


@dataclass(frozen=True, slots=True)
class LabToken:
    """A throw-away token.

    :ivar folder: the token's PINs, and the count of wrong PINs.
    :ivar options: options for a key provider's configuration to use the token.
    """

    uri: TokenUri
    folder: TokenFolder
    options: dict[str, object] = field(repr=False)

    def open(self) -> Token:
        """Log in to the token.

        :raise KeyProviderUnavailableError: When the token does not answer.
        """
        return TokenOptions.parse("the lab's token", self.folder.path, self.options).open()

    @property
    def pin(self) -> str:
        """The user PIN."""
        return PinSource.file(self.folder.pin).read().text


class LabHsm:
    """SoftHSM with any number of tokens.

    :raise LabUnavailableError: On entering the context, when SoftHSM is not installed.
    """

    def __init__(self, *, base: Path = Path("/tmp")) -> None:  # noqa: S108 -- uses a private folder below
        self._folder = OwnedDirectory(base, "the lab HSM")

    def __enter__(self) -> Self:
        self.module = _installed(MODULE_NAME, "softhsm2")
        self._folder.make()
        try:
            self.folder.write_config()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def folder(self) -> TokenFolder:
        """Folder of the configuration and all tokens.

        :raise LabError: When the folder has not been made, or was removed.
        """
        return TokenFolder(self._folder.path / "hsm")

    def remove(self) -> None:
        """Remove the folder with all tokens and keys."""
        self._folder.remove()

    @contextlib.contextmanager
    def token(self) -> Iterator[LabToken]:
        """A new token, removed at the end of the context."""
        label = f"lab-{secrets.token_hex(8)}"
        before = set(self.folder.tokens.iterdir())
        folder = TokenFolder(self.folder.path / label)
        _write_pins(folder)
        pins = (PinSource.file(folder.so_pin).read(), PinSource.file(folder.pin).read())
        serial = init_token(self.module, self.folder.environment, label, so_pin=pins[0], pin=pins[1])
        uri = TokenUri(token=label, serial=serial)
        try:
            yield LabToken(
                uri,
                folder,
                {
                    "uri": str(uri),
                    "module": str(self.module),
                    "pin-file": str(folder.pin),
                    "softhsm-config": str(self.folder.config),
                },
            )
        finally:
            for path in {folder.path, *set(self.folder.tokens.iterdir()) - before}:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def nss_token(*, base: Path = Path("/tmp")) -> Iterator[LabToken]:  # noqa: S108 -- a private folder below
    """The token of NSS's ``libsoftokn3.so``: independent of SoftHSM, with different behaviour.

    :raise LabUnavailableError: When NSS is not installed.
    """
    module = _installed(_NSS_MODULE_NAME, "libnss3")
    directory = directories.create(base)
    try:
        folder = TokenFolder(directory.path / "nss")
        private_folder(folder.tokens)
        _write_pins(folder)
        description = f"lab-{secrets.token_hex(8)}"
        reserved = f"configdir='sql:{folder.tokens}' dbTokenDescription='{description}' flags=noModDB"
        uri = TokenUri(token=description, slot_id=_NSS_SLOT)
        options: dict[str, object] = {
            "uri": str(uri),
            "module": str(module),
            "pin-file": str(folder.pin),
            "init-reserved": reserved,
        }
        with _few_rounds():
            process = ModuleProcess(load, module, reserved, environment={}, seconds=SECONDS)
            with contextlib.closing(process):
                process.call(SECONDS, _set_nss_pin, PinSource.file(folder.pin).read().text)
            yield LabToken(uri, folder, options)
    finally:
        directory.remove()


def _set_nss_pin(module: Module, pin: str) -> None:
    from PyKCS11 import CKF_RW_SESSION, CKU_SO

    session = module.library.openSession(_NSS_SLOT, CKF_RW_SESSION)
    session.login("", CKU_SO)
    session.initPin(pin)
    session.logout()
    session.closeSession()


@contextlib.contextmanager
def _few_rounds() -> Iterator[None]:
    """Make NSS use few rounds of key derivation.

    NSS derives a key from the PIN for every private object, at each use. The number of rounds is fixed when
    the object is written; the default of 10000 takes 40 ms.
    """
    before = os.environ.get(_NSS_ROUNDS)
    os.environ[_NSS_ROUNDS] = "1"
    try:
        yield
    finally:
        del os.environ[_NSS_ROUNDS]
        if before is not None:
            os.environ[_NSS_ROUNDS] = before


def _installed(name: str, package: str) -> Path:
    try:
        return find_module(name)
    except ConfigError as exc:
        raise LabUnavailableError(str(exc), hint=f"apt-get install {package}") from exc


def _write_pins(folder: TokenFolder) -> None:
    private_folder(folder.path)
    for path in (folder.pin, folder.so_pin):
        write_private(path, secrets.token_hex(16).encode() + b"\n")
