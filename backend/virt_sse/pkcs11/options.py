"""Options of a token in a configuration: its URI, its module, the file with the PIN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.pkcs11.module import find_module
from virt_sse.pkcs11.pins import PinGuard, PinSource
from virt_sse.pkcs11.softhsm import MODULE_NAME, VARIABLE, TokenFolder
from virt_sse.pkcs11.token import Token
from virt_sse.pkcs11.uri import SCHEME, TokenUri
from virt_sse.pkcs11.worker_user import WorkerUser

_OPTIONS = frozenset({"uri", "module", "pin-file", "softhsm-config", "init-reserved", "user"})


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """Options of a token. All are optional; the default is the token made by ``virt-sse host hsm init``.

    :ivar folder: location of the default token, and of the count of wrong PINs for any token.
    :ivar uri: names the token; ``None`` for the folder's token.
    :ivar module: path of the PKCS#11 module, or name of an installed module.
    :ivar softhsm_config: SoftHSM's configuration file, in place of the system's.
    :ivar reserved: see :class:`~virt_sse.pkcs11.module.Module`.
    :ivar user: user of the module's process; ``None`` for the caller's.
    """

    folder: TokenFolder
    uri: TokenUri | None
    module: str
    pin_file: Path
    softhsm_config: Path | None
    reserved: str | None
    user: WorkerUser | None

    @classmethod
    def parse(cls, table: str, folder: Path, options: Mapping[str, object]) -> Self:
        """Parse the options of a configuration table.

        :param table: the table's name, for messages.
        :raise ConfigError: When the options are invalid.
        """
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} in {table}")
        texts = {name: _text(table, name, value) for name, value in options.items()}
        own = TokenFolder(folder)
        uri = _uri(table, texts.get("uri"))
        is_own = uri is None and "module" not in texts
        config = _path(table, "softhsm-config", texts.get("softhsm-config"))
        return cls(
            folder=own,
            uri=uri,
            module=_module(table, texts.get("module"), uri),
            pin_file=_pin_file(table, texts.get("pin-file"), uri) or own.pin,
            softhsm_config=config or (own.config if is_own else None),
            reserved=texts.get("init-reserved"),
            user=_user(table, texts.get("user"), is_own=is_own),
        )

    @property
    def guard(self) -> PinGuard:
        """Counter of wrong PINs."""
        return PinGuard(self.folder.wrong_pins)

    @property
    def module_path(self) -> Path:
        """Path of the PKCS#11 module.

        :raise ConfigError: When the module is not installed.
        """
        return Path(self.module) if "/" in self.module else find_module(self.module)

    def token_uri(self) -> TokenUri:
        """URI of the token.

        :raise ConfigError: When the folder's token is configured but does not exist.
        """
        return self.uri or self.folder.read_uri()

    def open(self, pin: PinSource | None = None) -> Token:
        """Open the token.

        :param pin: PIN to use in place of the file's.
        :raise: As :meth:`Token.open`.
        """
        return Token.open(
            self.token_uri(),
            self.module_path,
            pin or PinSource.file(self.pin_file),
            guard=self.guard,
            reserved=self.reserved,
            environment={VARIABLE: str(self.softhsm_config)} if self.softhsm_config else {},
            user=self.user,
        )


def _text(table: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{name!r} in {table} must be a string")
    return value


def _path(table: str, name: str, value: str | None) -> Path | None:
    if value is not None and not Path(value).is_absolute():
        raise ConfigError(f"{name!r} in {table} must be an absolute path")
    return Path(value) if value is not None else None


def _uri(table: str, value: str | None) -> TokenUri | None:
    if value is None:
        return None
    try:
        uri = TokenUri.parse(value)
    except InvalidValueError as exc:
        raise ConfigError(f"'uri' in {table}: {exc}", hint=exc.hint) from exc
    if not uri.names_a_token:
        raise ConfigError(
            f"'uri' in {table} does not name a token",
            hint=f"for example {SCHEME}token=LABEL;serial=NUMBER",
        )
    if (uri.object, uri.id, uri.type) != (None, None, None):
        raise ConfigError(f"'uri' in {table} must name a token, not a key inside")
    return uri


def _module(table: str, value: str | None, uri: TokenUri | None) -> str:
    named = [each for each in (value, uri and uri.module_path, uri and uri.module_name) if each]
    if len(named) > 1:
        raise ConfigError(f"the module is named more than once in {table}")
    module = named[0] if named else MODULE_NAME
    if "/" in module and not Path(module).is_absolute():
        raise ConfigError(f"'module' in {table} must be an absolute path or a name")
    return module


def _user(table: str, value: str | None, *, is_own: bool) -> WorkerUser | None:
    if value is None:
        return None
    if is_own:
        raise ConfigError(
            f"'user' in {table} needs a 'uri'",
            hint="the files of the token made by 'virt-sse host hsm init' belong to root",
        )
    try:
        return WorkerUser.named(value)
    except InvalidValueError as exc:
        raise ConfigError(f"'user' in {table}: {exc}") from exc


def _pin_file(table: str, value: str | None, uri: TokenUri | None) -> Path | None:
    source = uri.pin_source if uri else None
    if value is not None and source is not None:
        raise ConfigError(f"the file with the PIN is named more than once in {table}")
    if source is not None and source.startswith("|"):
        raise ConfigError(f"'uri' in {table}: a PIN must come from a file, not from a program")
    return _path(table, "pin-file", value or (source.removeprefix("file:") if source else None))
