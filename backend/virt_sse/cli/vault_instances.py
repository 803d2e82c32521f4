"""``virt-sse vault export-root`` and ``import-root``: further instances of a vault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.output import note
from virt_sse.cli.vault_options import Database, Directory, database_url, vault_folder
from virt_sse.cli.vault_sealing import SealModule, SealPinFile, SealUri, SealUser, sealing_key
from virt_sse.errors import InvalidValueError

if TYPE_CHECKING:
    from virt_sse.vault.root_export import Passphrase

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="A file, 0600, with the passphrase of the export in its first line.",
        show_default="asked on the terminal",
    ),
]


def export_root(
    file: Annotated[Path, typer.Argument(help="The file to create.", show_default=False)],
    directory: Directory = None,
    passphrase_file: PassphraseFile = None,
    recipient: Annotated[
        Path | None,
        typer.Option(
            "--recipient",
            help="Encrypt for this public key, X25519 in PEM, instead of under a passphrase.",
            show_default=False,
        ),
    ] = None,
    unsealed: Annotated[
        bool,
        typer.Option(
            "--unsealed", help="Export a sealed root key itself, for an instance with another token or none."
        ),
    ] = False,
) -> None:
    """Export root key, CA and settings of a vault, encrypted: for a further instance, and as a backup."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.root_export import Recipient
    from virt_sse.vault.root_export import export_root as export
    from virt_sse.vault.root_key import is_sealed

    vault = VaultDirectory(vault_folder(directory))
    vault.settings()
    if passphrase_file and recipient:
        raise InvalidValueError("an export has a passphrase or a recipient, not both")
    secret = Recipient.read_public(recipient) if recipient else _passphrase(passphrase_file, new=True)
    export(vault, file, secret, unsealed=unsealed)
    if is_sealed(vault) and not unsealed:
        note(f"made {file}, with the root key sealed: a further instance needs the token of the sealing key")
    else:
        note(f"made {file}: whoever decrypts it and reads the vault's database has all keys of the vault")


def import_root(
    file: Annotated[Path, typer.Argument(help="A file made by 'vault export-root'.", show_default=False)],
    directory: Directory = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host", help="A further name or address of this instance, for its certificate. Can be repeated."
        ),
    ] = None,
    database: Database = None,
    passphrase_file: PassphraseFile = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            "--identity",
            help="The private key, 0600, X25519 in PEM, of the export's recipient.",
            show_default=False,
        ),
    ] = None,
    seal_uri: SealUri = None,
    seal_module: SealModule = None,
    seal_pin_file: SealPinFile = None,
    seal_user: SealUser = None,
) -> None:
    """Make an instance of an existing vault in a new folder, from an export."""
    from virt_sse.vault.root_export import Recipient
    from virt_sse.vault.root_export import import_root as import_

    if passphrase_file and identity:
        raise InvalidValueError("an export has a passphrase or a recipient, not both")
    secret = Recipient.read_private(identity) if identity else _passphrase(passphrase_file, new=False)
    made = import_(
        file,
        vault_folder(directory),
        secret,
        hosts=host or (),
        database=database_url(database),
        sealed_by=sealing_key(seal_uri, seal_module, seal_pin_file, seal_user),
    )
    settings = made.settings()
    note(f"made an instance of vault {settings.url} in {made.path}, with an audit log of its own")
    if settings.database is None:
        note("restore the vault's database with 'virt-sse vault restore'")
    if settings.hsm is not None:
        options = ", ".join(f"{name} {value}" for name, value in settings.hsm.options.items())
        note(f"this instance needs the vault's HSM token: {options or f'copy {made.hsm_path}'}")


def _passphrase(file: Path | None, *, new: bool) -> Passphrase:
    from virt_sse.vault.root_export import Passphrase

    if file is not None:
        return Passphrase.read(file)
    if not sys.stdin.isatty():
        raise InvalidValueError(
            "the export needs a passphrase, and there is no terminal to ask on",
            hint="pass --passphrase-file or --recipient" if new else "pass --passphrase-file or --identity",
        )
    return Passphrase(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True))
