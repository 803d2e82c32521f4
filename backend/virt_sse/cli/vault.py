"""``virt-sse vault``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows
from virt_sse.errors import InvalidValueError
from virt_sse.vault_client.permissions import ADMINISTRATION, USE, Permission, Role

if TYPE_CHECKING:
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault_client.administration import PrincipalInfo, VaultClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
access = typer.Typer(
    help="Permissions of principals on the vault's keys.", no_args_is_help=True, rich_markup_mode=None
)
principal = typer.Typer(help="The vault's principals.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(access, name="access")
hsm = typer.Typer(help="The HSM of a premium vault.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(principal, name="principal")
app.add_typer(hsm, name="hsm")

_PORT, _HOSTS = 8443, ["localhost", "127.0.0.1"]

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
PrincipalName = Annotated[
    str,
    typer.Argument(
        metavar="PRINCIPAL", help="The principal's name, client id or object id.", show_default=False
    ),
]


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


@app.command()
def init(
    directory: Directory = None,
    name: Annotated[str, typer.Option("--name", help="The vault's name.")] = "vault",
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="A name or address of the server; the first is part of the vault's URL. Can be repeated.",
            show_default=", ".join(_HOSTS),
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", help="The port in the vault's URL.", min=1, max=65535)
    ] = _PORT,
    tier: Annotated[
        str, typer.Option("--tier", help="standard or premium; premium has an HSM.")
    ] = "standard",
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="The vault's tenant, a UUID.", show_default="a new UUID")
    ] = None,
    hsm_uri: HsmUri = None,
    hsm_module: HsmModule = None,
    hsm_pin_file: HsmPinFile = None,
    hsm_user: HsmUser = None,
    retention_days: Annotated[
        int, typer.Option("--retention-days", help="Retention of deleted keys: 7 to 90 days.")
    ] = 90,
    purge_protection: Annotated[
        bool, typer.Option("--purge-protection", help="Forbid purging before that. Irrevocable.")
    ] = False,
) -> None:
    """Create a vault: root key, certificates, database, and an administrator's credential file."""
    from virt_sse.vault.home.settings import Tier
    from virt_sse.vault.initialise import initialise

    try:
        chosen = Tier(tier)
    except ValueError as exc:
        raise InvalidValueError(f"invalid tier {tier!r}: choose standard or premium") from exc
    made = initialise(
        _directory(directory),
        name=name,
        hosts=host or _HOSTS,
        port=port,
        tier=chosen,
        tenant=tenant,
        retention_days=retention_days,
        purge_protection=purge_protection,
        hsm=_hsm_options(hsm_uri, hsm_module, hsm_pin_file, hsm_user),
    )
    typer.echo(f"made vault {made.settings().url} in {made.path}")
    typer.echo(f"made {made.administrator_path}: keep it secret, it administers the vault")
    typer.echo(
        f"back up {made.root_key_path} and, with 'virt-sse vault backup', {made.database_path} separately: "
        "the vault's keys are lost without either file"
    )
    _print_hsm(made)


@app.command()
def serve(
    directory: Directory = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            help="The port to listen on.",
            show_default="the port in the vault's URL",
            min=0,
            max=65535,
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option("--concurrency", help="Maximum of concurrent requests; excess requests get 429.", min=1),
    ] = 512,
    rate: Annotated[
        float,
        typer.Option(
            "--rate", help="Maximum of requests a second; excess requests get 429. 0: no limit.", min=0
        ),
    ] = 0,
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            help="Maximum of connections; beyond, the connection waiting longest for its client ends.",
            min=1,
        ),
    ] = 1024,
    connections_per_address: Annotated[
        int,
        typer.Option(
            "--connections-per-address", help="Maximum of connections of one client's address.", min=1
        ),
    ] = 256,
    request_seconds: Annotated[
        float,
        typer.Option(
            "--request-seconds", help="Time for a TLS handshake, and for a request's headers.", min=0.1
        ),
    ] = 10.0,
    idle_seconds: Annotated[
        float,
        typer.Option("--idle-seconds", help="Time between two requests of a connection.", min=1),
    ] = 75.0,
    token_seconds: Annotated[
        int, typer.Option("--token-seconds", help="Lifetime of access tokens.", min=1, max=900)
    ] = 900,
    shortest_rotation: Annotated[
        int | None,
        typer.Option(
            "--shortest-rotation",
            help="The shortest interval in a rotation policy, in seconds.",
            show_default="7 days, as in Azure",
            min=1,
        ),
    ] = None,
    upkeep_seconds: Annotated[
        float, typer.Option("--upkeep-seconds", help="Interval of checks for due rotations.", min=0.05)
    ] = 30.0,
) -> None:
    """Serve the vault until SIGTERM."""
    from virt_sse.vault.http.limits import Limits
    from virt_sse.vault.http.server import serve as serve_vault

    serve_vault(
        _directory(directory),
        host=host,
        port=port,
        limits=Limits(
            concurrency,
            rate,
            connections=connections,
            connections_per_address=connections_per_address,
            request_seconds=request_seconds,
            idle_seconds=idle_seconds,
        ),
        token_seconds=token_seconds,
        shortest_rotation=shortest_rotation,
        upkeep_seconds=upkeep_seconds,
        listening=lambda url: print(f"listening on {url}", flush=True),  # noqa: T201 -- typer's echo does not flush a pipe
    )


@app.command()
def rescue(
    name: Annotated[str, typer.Argument(help="The new administrator's name.", show_default=False)],
    file: Annotated[Path, typer.Option("--file", help="The credential file to create.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Create an administrator without a login, on the vault's machine, while the vault is not served."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.initialise import add_administrator

    add_administrator(VaultDirectory(_directory(directory)), name, file)
    typer.echo(f"made {file}: keep it secret, it administers the vault")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to create.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Copy the vault's database, on the vault's machine, also while the vault is served."""
    from virt_sse.vault.backup import back_up
    from virt_sse.vault.home.layout import VaultDirectory

    vault = VaultDirectory(_directory(directory))
    back_up(vault, file)
    typer.echo(f"made {file}: back up {vault.root_key_path} too, apart from it")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file made by 'vault backup'.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Restore the database of a vault that has none, while the vault is not served."""
    from virt_sse.vault.backup import restore as restore_vault
    from virt_sse.vault.home.layout import VaultDirectory

    vault = VaultDirectory(_directory(directory))
    restore_vault(vault, file)
    typer.echo(
        f"made {vault.database_path}: review 'vault access list', which may have revoked permissions again"
    )


@app.command()
def status(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """Show the vault's settings and numbers of keys and principals."""
    with _client(credential) as client:
        fields = {name.replace("_", "-"): value for name, value in client.status().items()}
    print_fields(fields, output)


@access.command(name="list")
def list_access(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the permissions of all principals."""
    with _client(credential) as client:
        rows = [
            {"principal": name, "permissions": _names(granted, output)}
            for name, granted in client.access().items()
        ]
    print_rows(rows, ("principal", "permissions"), output)


@access.command(name="set")
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
    with _client(credential) as client:
        granted = client.set_permissions(name, granted)
    print_fields({"principal": name, "permissions": _names(granted, output)}, output)


@access.command(name="remove")
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
    with _client(credential) as client:
        left = client.revoke(name, _permissions(permissions) if permissions else None)
    print_fields({"principal": name, "permissions": _names(left, output)}, output)


@principal.command(name="list")
def list_principals(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List the principals."""
    with _client(credential) as client:
        rows = [_fields(each) for each in client.principals()]
    print_rows(rows, ("name", "client-id", "role", "enabled", "expires"), output)


@principal.command(name="create")
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
    with _client(credential) as client:
        made = client.new_credential_file(file, name, role=chosen, expires=expires)
        fields = _fields(client.get_principal(made.client_id))
    print_fields(fields | {"file": str(file)}, output)


@principal.command(name="disable")
def disable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Disable a principal, with immediate effect, until it is enabled again."""
    with _client(credential) as client:
        client.disable_principal(name)
    typer.echo(f"disabled principal {name}")


@principal.command(name="enable")
def enable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Enable a disabled principal."""
    with _client(credential) as client:
        client.enable_principal(name)
    typer.echo(f"enabled principal {name}")


@principal.command(name="delete")
def delete_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Delete a principal and its permissions, with immediate effect."""
    with _client(credential) as client:
        client.delete_principal(name)
    typer.echo(f"deleted principal {name}")


@hsm.command(name="add")
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

    vault = VaultDirectory(_directory(directory))
    add_hsm(vault, _hsm_options(hsm_uri, hsm_module, hsm_pin_file, hsm_user))
    _print_hsm(vault)


@hsm.command(name="unlock")
def unlock_hsm(directory: Directory = None) -> None:
    """Reset the count of wrong PINs, which blocks logins after too many, and try the current PIN."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.hsm.access import unlock_hsm

    unlock_hsm(VaultDirectory(_directory(directory)))
    typer.echo("the token takes the PIN")


def _hsm_options(
    uri: str | None, module: str | None, pin_file: Path | None, user: str | None
) -> dict[str, str]:
    pin = str(pin_file.absolute()) if pin_file else None
    named = {"uri": uri, "module": module, "pin-file": pin, "user": user}
    options = {name: value for name, value in named.items() if value is not None}
    if options and uri is None:
        raise InvalidValueError("--hsm-module, --hsm-pin-file and --hsm-user need --hsm-uri")
    return options


def _print_hsm(vault: VaultDirectory) -> None:
    hsm = vault.settings().hsm
    if hsm is None:
        return
    if hsm.options:
        typer.echo(f"keeps RSA-HSM keys in {hsm.options['uri']}")
    else:
        typer.echo(
            f"back up {vault.hsm_path} too: the SoftHSM token with the vault's RSA-HSM keys, and its PIN"
        )


def _directory(given: Path | None) -> Path:
    return (given or session.config().state_directory / "vault").absolute()


def _client(credential: Path | None) -> VaultClient:
    from virt_sse.vault_client.administration import VaultClient

    return VaultClient(credential_path(credential))


def credential_path(given: Path | None) -> Path:
    """Choose the credential file: *given*, or the administrator's file of this host's vault."""
    return given or _directory(None) / "administrator.json"


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
