"""A vault's HSM token: a SoftHSM token in the vault's folder, or an external HSM token."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from virt_sse import pkcs11
from virt_sse.errors import ConfigError, InvalidValueError, VaultError
from virt_sse.system.files import write_private
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import NEEDS_A_SHARED_HSM, HsmSettings, Tier, VaultSettings
from virt_sse.vault.hsm.protection import ANCHOR

if TYPE_CHECKING:
    from virt_sse.pkcs11.options import TokenOptions
    from virt_sse.pkcs11.token import Token

_LABEL = "virt-sse vault"


def prepare_hsm(directory: VaultDirectory, options: Mapping[str, str]) -> HsmSettings:
    """Log in to the vault's HSM token and create the vault's anchor object in the token.

    :param options: as in :class:`~virt_sse.pkcs11.options.TokenOptions`; if empty, a SoftHSM token is created
        in the vault's folder.
    :return: settings with the token's serial number, which tells a replaced token from the original token.
    :raise ConfigError: When *options* are invalid, PyKCS11, the module or SoftHSM is not installed, or the
        PIN cannot be read.
    :raise KeyProviderUnavailableError: When the token does not answer or rejects the PIN.
    """
    tag = f"virt-sse-vault-{secrets.token_hex(8)}"
    parsed = _parse(directory, options)
    if options:
        parsed.guard.reset()  # the operator has just named the PIN file: forget earlier wrong PINs
    else:
        parsed.folder.initialise(_LABEL)
    with contextlib.closing(parsed.open()) as token:
        token.generate_aes(tag, ANCHOR)
        uri = dataclasses.replace(parsed.token_uri(), serial=token.serial)
    return HsmSettings(tag, {**options, "uri": str(uri)} if options else {})


def require_shared(settings: VaultSettings, options: Mapping[str, str]) -> None:
    """Check that all instances of a vault in PostgreSQL reach the HSM token of *options*.

    :raise InvalidValueError: When it would be a SoftHSM token in the folder of one instance.
    """
    if settings.database is not None and not options:
        raise InvalidValueError(NEEDS_A_SHARED_HSM, hint="pass --hsm-uri")


def open_hsm(directory: VaultDirectory, settings: HsmSettings) -> Token:
    """Log in to the vault's HSM token.

    :raise ConfigError: As :func:`prepare_hsm`.
    :raise KeyProviderUnavailableError: As :func:`prepare_hsm`.
    """
    parsed = _parse(directory, settings.options)
    if not settings.options:
        parsed.token_uri()  # raises if the token is missing; initialise() would create a new token
        try:
            parsed.folder.write_config()  # the vault's folder may have been moved
        except OSError as exc:
            raise ConfigError(f"cannot write {parsed.folder.config}: {exc.strerror}") from exc
        parsed.folder.initialise(_LABEL)  # completes an initialisation cut off by a kill
    return parsed.open()


def add_hsm(directory: VaultDirectory, options: Mapping[str, str]) -> None:
    """Add an HSM token to a vault without an HSM, as :func:`prepare_hsm` does; the vault's tier becomes
    premium.

    :raise VaultError: When there is no vault, a process serves the vault, or the vault has an HSM already.
    :raise ConfigError: As :func:`prepare_hsm`.
    :raise KeyProviderUnavailableError: As :func:`prepare_hsm`.
    """
    directory.settings()
    with directory.lock():
        settings = directory.settings()
        if settings.hsm is not None:
            raise VaultError("the vault has an HSM already")
        require_shared(settings, options)
        prepared = prepare_hsm(directory, options)
        changed = msgspec.structs.replace(settings, tier=Tier.PREMIUM, hsm=prepared)
        write_private(directory.settings_path, changed.to_json())


def unlock_hsm(directory: VaultDirectory) -> None:
    """Reset the count of wrong PINs, which blocks logins after too many failures, and log in.

    :raise VaultError: When the vault has no HSM.
    :raise ConfigError: As :func:`prepare_hsm`.
    :raise KeyProviderUnavailableError: As :func:`prepare_hsm`.
    """
    settings = directory.settings().hsm
    if settings is None:
        raise VaultError("the vault has no HSM", hint="'virt-sse vault hsm add' adds an HSM")
    _parse(directory, settings.options).guard.reset()
    open_hsm(directory, settings).close()


def _parse(directory: VaultDirectory, options: Mapping[str, str]) -> TokenOptions:
    pkcs11.require()
    from virt_sse.pkcs11.options import TokenOptions

    return TokenOptions.parse("the vault's settings", directory.hsm_path, options)
