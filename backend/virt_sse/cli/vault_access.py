"""``virt-sse vault access``."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows
from virt_sse.cli.vault_options import Credential, PrincipalName, open_client
from virt_sse.errors import InvalidValueError
from virt_sse.vault_client.permissions import ADMINISTRATION, USE, Permission

app = typer.Typer(
    help="Permissions of principals on the vault's keys.", no_args_is_help=True, rich_markup_mode=None
)


Key = Annotated[
    str | None,
    typer.Option("--key", metavar="NAME", help="Permissions on this key alone.", show_default="all keys"),
]


@app.command(name="list")
def list_access(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the permissions of all principals: on all keys, then on single keys."""
    with open_client(credential) as client:
        policies = client.access()
    rows = [
        {"principal": policy.name, "key": key, "permissions": _names(policy.on(key), output)}
        for policy in policies
        for key in (None, *policy.keys)
    ]
    print_rows(rows, ("principal", "key", "permissions"), output)


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
    key: Key = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Set the permissions of a principal on all keys, or on one key, replacing earlier permissions there."""
    granted = _permissions(permissions)
    with open_client(credential) as client:
        granted = client.set_permissions(name, granted, key=key)
    print_fields({"principal": name, "key": key, "permissions": _names(granted, output)}, output)


@app.command(name="remove", cls=DestructiveCommand)
def remove_access(
    name: PrincipalName,
    permissions: Annotated[
        list[str] | None,
        typer.Argument(help="The permissions to remove.", show_default="all"),
    ] = None,
    key: Key = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Remove permissions of a principal, with immediate effect.

    Without --key, the given permissions on all keys; without permissions, too, those on single keys as well.
    """
    taken = _permissions(permissions) if permissions else None
    with open_client(credential) as client:

        def plan() -> list[str]:
            found = client.get_principal(name)
            what = ", ".join(each.value for each in taken) if taken else "all permissions"
            return [f"take from principal {found.name} ({found.client_id}): {what} on {key or 'all keys'}"]

        confirm(plan)
        if permissions or key is not None:
            left = client.revoke(name, taken, key=key)
        else:
            client.revoke_all(name)
            left = frozenset()
    print_fields({"principal": name, "key": key, "permissions": _names(left, output)}, output)


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
