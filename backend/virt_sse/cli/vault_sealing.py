"""``virt-sse vault seal-root`` and ``unseal-root``, and the options that name the sealing key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.output import note
from virt_sse.cli.vault_options import Directory, token_options, vault_folder

if TYPE_CHECKING:
    from virt_sse.vault.hsm.sealed_root import SealingKey

NEEDS_SEALING_KEY = "the vault's keys are lost without the sealing key in the token"

SealUri = Annotated[
    str | None,
    typer.Option(
        "--seal-uri",
        help="URI (RFC 7512) of the key in a PKCS#11 token that seals the root key, e.g. "
        "'pkcs11:token=LABEL;object=KEY'.",
        show_default=False,
    ),
]
SealModule = Annotated[
    str | None,
    typer.Option("--seal-module", help="The token's PKCS#11 module, by path or name.", show_default=False),
]
SealPinFile = Annotated[
    Path | None,
    typer.Option(
        "--seal-pin-file",
        help="A file, 0600, with the user's PIN, e.g. a credential of systemd; its path is stored.",
        show_default=False,
    ),
]
SealUser = Annotated[
    str | None,
    typer.Option(
        "--seal-user", help="The user that runs the module, in a process of its own.", show_default="yours"
    ),
]
NewKey = Annotated[
    bool,
    typer.Option(
        "--new-seal-key", help="Make the sealing key in the token, AES with 256 bits, or a new version of it."
    ),
]


def seal_root(
    directory: Directory = None,
    seal_uri: SealUri = None,
    seal_module: SealModule = None,
    seal_pin_file: SealPinFile = None,
    seal_user: SealUser = None,
    new_seal_key: NewKey = False,
) -> None:
    """Seal the vault's root key by a key in a PKCS#11 token, while the vault is not served.

    A sealed root key is sealed anew: without --seal-uri, by the newest version of its sealing key.
    """
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.root_key import seal_root as seal

    vault = VaultDirectory(vault_folder(directory))
    by = sealing_key(seal_uri, seal_module, seal_pin_file, seal_user)
    was_clear = vault.root_key_path.exists()
    sealed = seal(vault, by, new_key=new_seal_key)
    note(f"sealed the root key by key {sealed.key}, version {sealed.version}, in {vault.sealed_root_path}")
    note(NEEDS_SEALING_KEY)
    if was_clear:
        note("older copies of root.key still open the vault: destroy them, backups included")


def unseal_root(directory: Directory = None) -> None:
    """Write the vault's sealed root key back into a file in the clear, while the vault is not served."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.root_key import unseal_root as unseal

    vault = VaultDirectory(vault_folder(directory))
    unseal(vault)
    note(f"made {vault.root_key_path}: whoever reads it and the vault's database has the software keys")


def sealing_key(
    uri: str | None, module: str | None, pin_file: Path | None, user: str | None
) -> SealingKey | None:
    """The key named by the options; ``None`` without ``--seal-uri``.

    :raise InvalidValueError: When the URI does not name a key in a token, or is missing beside other options.
    """
    from virt_sse.vault.hsm.sealed_root import SealingKey

    options = token_options("seal", uri, module, pin_file, user)
    return SealingKey.parse(options) if options else None
