"""``virt-sse vault hsm``, and the options that name a vault's HSM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.output import note
from virt_sse.cli.vault_options import Directory, token_options, vault_folder

if TYPE_CHECKING:
    from virt_sse.vault.home.layout import VaultDirectory

app = typer.Typer(help="The HSM of a premium vault.", no_args_is_help=True, rich_markup_mode=None)

HsmUri = Annotated[
    str | None,
    typer.Option(
        "--hsm-uri",
        help="URI (RFC 7512) of the PKCS#11 token for RSA-HSM keys, e.g. pkcs11:token=LABEL.",
        show_default="a SoftHSM token in the vault's folder",
    ),
]
HsmModule = Annotated[
    str | None,
    typer.Option("--hsm-module", help="The token's PKCS#11 module, by path or name.", show_default=False),
]
HsmPinFile = Annotated[
    Path | None,
    typer.Option(
        "--hsm-pin-file", help="A file, 0600, with the user's PIN; its path is stored.", show_default=False
    ),
]
HsmUser = Annotated[
    str | None,
    typer.Option(
        "--hsm-user", help="The user that runs the module, in a process of its own.", show_default="yours"
    ),
]


@app.command(name="add")
def add_hsm(
    directory: Directory = None,
    hsm_uri: HsmUri = None,
    hsm_module: HsmModule = None,
    hsm_pin_file: HsmPinFile = None,
    hsm_user: HsmUser = None,
) -> None:
    """Add an HSM to a vault, while the vault is not served. The vault's tier becomes premium."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.hsm.access import add_hsm

    vault = VaultDirectory(vault_folder(directory))
    add_hsm(vault, hsm_options(hsm_uri, hsm_module, hsm_pin_file, hsm_user))
    print_hsm(vault)


@app.command(name="unlock")
def unlock_hsm(directory: Directory = None) -> None:
    """Reset the count of wrong PINs, which blocks logins after too many, and try the current PIN.

    Also for the token that seals the vault's root key.
    """
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.hsm.access import unlock_hsm
    from virt_sse.vault.root_key import unlock_sealing

    vault = VaultDirectory(vault_folder(directory))
    is_sealed = unlock_sealing(vault)
    if vault.settings().hsm is not None or not is_sealed:
        unlock_hsm(vault)
    note("the token takes the PIN")


def hsm_options(
    uri: str | None, module: str | None, pin_file: Path | None, user: str | None
) -> dict[str, str]:
    """The vault's HSM as settings; empty for a SoftHSM token in the vault's folder.

    :raise InvalidValueError: When an option is given without ``--hsm-uri``.
    """
    return token_options("hsm", uri, module, pin_file, user)


def print_hsm(vault: VaultDirectory) -> None:
    """Print where the vault keeps RSA-HSM keys, if it has an HSM."""
    hsm = vault.settings().hsm
    if hsm is None:
        return
    if hsm.options:
        note(f"keeps RSA-HSM keys in {hsm.options['uri']}")
    else:
        note(f"back up {vault.hsm_path} too: the SoftHSM token with the vault's RSA-HSM keys, and its PIN")
