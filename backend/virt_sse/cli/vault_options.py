"""Options of the commands that use a vault, and the values that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import session
from virt_sse.errors import InvalidValueError
from virt_sse.system.database_url import refuse_password

if TYPE_CHECKING:
    from virt_sse.vault_client.administration import VaultClient

Directory = Annotated[
    Path | None,
    typer.Option("--directory", "-d", help="The vault's folder.", show_default="vault, in virt-sse's state"),
]
Credential = Annotated[
    Path | None,
    typer.Option(
        "--credential",
        "-c",
        envvar="VIRT_SSE_VAULT_CREDENTIAL",
        help="An administrator's credential file.",
        show_default="administrator.json, in the vault's folder",
    ),
]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="The vault's database in PostgreSQL, for several instances: postgresql+psycopg://USER@HOST/NAME.",
        show_default="SQLite, in the vault's folder",
    ),
]
PrincipalName = Annotated[
    str,
    typer.Argument(
        metavar="PRINCIPAL", help="The principal's name, client id or object id.", show_default=False
    ),
]


def vault_folder(given: Path | None) -> Path:
    """The vault's folder: *given*, or the default in this host's state."""
    return (given or session.config().state_directory / "vault").absolute()


def database_url(given: str | None) -> str | None:
    """The URL of a database from a command line.

    :raise InvalidValueError: When *given* has a password, which other users could see.
    """
    if given is not None:
        refuse_password(given)
    return given


def token_options(
    prefix: str, uri: str | None, module: str | None, pin_file: Path | None, user: str | None
) -> dict[str, str]:
    """A PKCS#11 token by the options ``--PREFIX-uri`` and so on, as in a vault's files; may be empty.

    :raise InvalidValueError: When an option is given without the URI.
    """
    pin = str(pin_file.absolute()) if pin_file else None
    named = {"uri": uri, "module": module, "pin-file": pin, "user": user}
    options = {name: value for name, value in named.items() if value is not None}
    if options and uri is None:
        raise InvalidValueError(
            f"--{prefix}-module, --{prefix}-pin-file and --{prefix}-user need --{prefix}-uri"
        )
    return options


def open_client(credential: Path | None) -> VaultClient:
    """A client of the vault named by the file *credential*; a context manager."""
    from virt_sse.vault_client.administration import VaultClient

    return VaultClient(credential_path(credential))


def credential_path(given: Path | None) -> Path:
    """Choose the credential file: *given*, or the administrator's file of this host's vault."""
    return given or vault_folder(None) / "administrator.json"
