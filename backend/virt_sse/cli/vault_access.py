"""``virt-sse vault access``."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows
from virt_sse.cli.vault_options import Credential, PrincipalName, open_client
from virt_sse.errors import InvalidValueError
from virt_sse.vault_client.permissions import ADMINISTRATION, USE, Permission

app = typer.Typer(
    help="Permissions of principals on the vault's keys.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(name="list")
def list_access(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the permissions of all principals."""
    with open_client(credential) as client:
        rows = [
            {"principal": name, "permissions": _names(granted, output)}
            for name, granted in client.access().items()
        ]
    print_rows(rows, ("principal", "permissions"), output)


@app.command(name="set")
def set_access(
    name: PrincipalName,
    permissions: Annotated[
        list[str],
        typer.Argument(
            help=f"All permissions from now on, out of: {', '.join(p.value for p in Permission)}; "
            "'use' stands for all permissions to use keys, 'administer' for all remaining permissions.",
            show_default=False,
        ),
    ],
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Set the permissions of a principal, replacing earlier permissions."""
    granted = _permissions(permissions)
    with open_client(credential) as client:
        granted = client.set_permissions(name, granted)
    print_fields({"principal": name, "permissions": _names(granted, output)}, output)


@app.command(name="remove")
def remove_access(
    name: PrincipalName,
    permissions: Annotated[
        list[str] | None,
        typer.Argument(help="The permissions to remove.", show_default="all"),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Remove permissions of a principal, with immediate effect."""
    with open_client(credential) as client:
        left = client.revoke(name, _permissions(permissions) if permissions else None)
    print_fields({"principal": name, "permissions": _names(left, output)}, output)


def _permissions(names: list[str]) -> frozenset[Permission]:
    groups = {"use": USE, "administer": ADMINISTRATION}
    by_name = {permission.value.lower(): frozenset({permission}) for permission in Permission} | groups
    chosen: frozenset[Permission] = frozenset()
    for name in names:
        if name.lower() not in by_name:
            raise InvalidValueError(
                f"invalid permission {name!r}", hint=f"choose from {', '.join(p.value for p in Permission)}"
            )
        chosen |= by_name[name.lower()]
    return chosen


def _names(permissions: frozenset[Permission], output: OutputFormat) -> object:
    names = [permission.value for permission in Permission if permission in permissions]
    return names if output is OutputFormat.JSON else ",".join(names)
