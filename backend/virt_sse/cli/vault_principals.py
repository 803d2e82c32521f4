"""``virt-sse vault principal``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.vault_options import Credential, PrincipalName, open_client
from virt_sse.errors import InvalidValueError
from virt_sse.vault_client.permissions import Role

if TYPE_CHECKING:
    from virt_sse.vault_client.administration import PrincipalInfo

app = typer.Typer(help="The vault's principals.", no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def list_principals(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the principals."""
    with open_client(credential) as client:
        rows = [_fields(each) for each in client.principals()]
    print_rows(rows, ("name", "client-id", "role", "enabled", "expires"), output)


@app.command(name="create")
def create_principal(
    name: Annotated[str, typer.Argument(help="The new principal's name.", show_default=False)],
    file: Annotated[Path, typer.Option("--file", help="The credential file to create.", show_default=False)],
    role: Annotated[str, typer.Option("--role", help=f"One of {', '.join(r.value for r in Role)}.")] = "none",
    days: Annotated[
        int | None,
        typer.Option(
            "--days", help="Days until the principal expires.", show_default="never", min=1, max=36500
        ),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a principal, without permissions on keys, and its credential file."""
    try:
        chosen = Role(role)
    except ValueError as exc:
        raise InvalidValueError(
            f"invalid role {role!r}: choose one of {', '.join(r.value for r in Role)}"
        ) from exc
    expires = None if days is None else int(datetime.now(UTC).timestamp()) + days * 86400
    with open_client(credential) as client:
        made = client.new_credential_file(file, name, role=chosen, expires=expires)
        fields = _fields(client.get_principal(made.client_id))
    print_fields(fields | {"file": str(file)}, output)


@app.command(name="disable", cls=DestructiveCommand)
def disable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Disable a principal, with immediate effect, until it is enabled again."""
    with open_client(credential) as client:
        confirm(lambda: [f"disable {_named(client.get_principal(name))}"])
        client.disable_principal(name)
    note(f"disabled principal {name}")


@app.command(name="enable")
def enable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Enable a disabled principal."""
    with open_client(credential) as client:
        client.enable_principal(name)
    note(f"enabled principal {name}")


@app.command(name="delete", cls=DestructiveCommand)
def delete_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Delete a principal and its permissions, with immediate effect."""
    with open_client(credential) as client:
        confirm(lambda: [f"delete {_named(client.get_principal(name))} and its permissions"])
        client.delete_principal(name)
    note(f"deleted principal {name}")


def _named(info: PrincipalInfo) -> str:
    return f"principal {info.name} ({info.client_id})"


def _fields(info: PrincipalInfo) -> dict[str, object]:
    def moment(seconds: int | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()

    return {
        "name": info.name,
        "client-id": info.client_id,
        "object-id": info.object_id,
        "tenant": info.tenant,
        "role": info.role.value,
        "enabled": info.enabled,
        "expires": moment(info.expires),
        "created": moment(info.created),
        "created-by": info.created_by,
    }
