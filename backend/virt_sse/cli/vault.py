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

app = typer.Typer(help="The embedded key vault.", no_args_is_help=True, rich_markup_mode=None)
access = typer.Typer(
    help="Who may do what with the vault's keys.", no_args_is_help=True, rich_markup_mode=None
)
principal = typer.Typer(help="Whom the vault knows.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(access, name="access")
hsm = typer.Typer(help="The token of a premium vault.", no_args_is_help=True, rich_markup_mode=None)
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
    str, typer.Argument(metavar="PRINCIPAL", help="Its name, client id or object id.", show_default=False)
]


HsmUri = Annotated[
    str | None,
    typer.Option(
        "--hsm-uri",
        help="The PKCS#11 token for RSA-HSM keys, as RFC 7512 has it, e.g. pkcs11:token=LABEL.",
        show_default="a SoftHSM token of the vault's own",
    ),
]
HsmModule = Annotated[
    str | None,
    typer.Option("--hsm-module", help="That token's PKCS#11 module, by path or name.", show_default=False),
]
HsmPinFile = Annotated[
    Path | None,
    typer.Option("--hsm-pin-file", help="A file, 0600, with its user's PIN; it is kept.", show_default=False),
]


@app.command()
def init(
    directory: Directory = None,
    name: Annotated[str, typer.Option("--name", help="The vault's name.")] = "vault",
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="A name or address that clients reach it by; the first is in its URL. Can be repeated.",
            show_default=", ".join(_HOSTS),
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", help="The port in its URL.", min=1, max=65535)] = _PORT,
    tier: Annotated[str, typer.Option("--tier", help="standard, or premium: with an HSM.")] = "standard",
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Its tenant, a UUID.", show_default="a new one")
    ] = None,
    hsm_uri: HsmUri = None,
    hsm_module: HsmModule = None,
    hsm_pin_file: HsmPinFile = None,
    retention_days: Annotated[
        int, typer.Option("--retention-days", help="How long deleted keys are kept: 7 to 90.")
    ] = 90,
    purge_protection: Annotated[
        bool, typer.Option("--purge-protection", help="Nobody may purge a key before that. For good.")
    ] = False,
) -> None:
    """Make a vault: its root key, certificates and database, and an administrator's credential file."""
    from virt_sse.vault.home.settings import Tier
    from virt_sse.vault.initialise import initialise

    try:
        chosen = Tier(tier)
    except ValueError as exc:
        raise InvalidValueError(f"a vault's tier is standard or premium, not {tier!r}") from exc
    made = initialise(
        _directory(directory),
        name=name,
        hosts=host or _HOSTS,
        port=port,
        tier=chosen,
        tenant=tenant,
        retention_days=retention_days,
        purge_protection=purge_protection,
        hsm=_hsm_options(hsm_uri, hsm_module, hsm_pin_file),
    )
    typer.echo(f"made vault {made.settings().url} in {made.path}")
    typer.echo(f"made {made.administrator_path}: whoever has it administers the vault")
    typer.echo(
        f"back up {made.root_key_path} and {made.database_path}, apart: without both its keys are lost"
    )
    _print_hsm(made)


@app.command()
def serve(
    directory: Directory = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", help="The port to listen on.", show_default="the one in its URL", min=0, max=65535
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", help="Requests at once; more are answered 429.", min=1)
    ] = 512,
    rate: Annotated[
        float, typer.Option("--rate", help="Requests a second; more are answered 429. 0: no limit.", min=0)
    ] = 0,
    token_seconds: Annotated[
        int, typer.Option("--token-seconds", help="How long access tokens are good for.", min=1, max=900)
    ] = 900,
    shortest_rotation: Annotated[
        int | None,
        typer.Option(
            "--shortest-rotation",
            help="The shortest interval, in seconds, that a rotation policy may have.",
            show_default="7 days, as in Azure",
            min=1,
        ),
    ] = None,
    upkeep_seconds: Annotated[
        float, typer.Option("--upkeep-seconds", help="How often due rotations are looked for.", min=0.05)
    ] = 30.0,
) -> None:
    """Serve the vault until SIGTERM."""
    from virt_sse.vault.http.limits import Limits
    from virt_sse.vault.http.server import serve as serve_vault

    serve_vault(
        _directory(directory),
        host=host,
        port=port,
        limits=Limits(concurrency, rate),
        token_seconds=token_seconds,
        shortest_rotation=shortest_rotation,
        upkeep_seconds=upkeep_seconds,
        listening=lambda url: print(f"listening on {url}", flush=True),  # noqa: T201 -- typer's echo does not flush a pipe
    )


@app.command()
def rescue(
    name: Annotated[str, typer.Argument(help="The new administrator's name.", show_default=False)],
    file: Annotated[Path, typer.Option("--file", help="The credential file to make.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Make another administrator, on the vault's own machine while it is not served: when none is left."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.initialise import add_administrator

    add_administrator(VaultDirectory(_directory(directory)), name, file)
    typer.echo(f"made {file}: whoever has it administers the vault")


@app.command()
def status(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """Ask the vault what it is and holds."""
    with _client(credential) as client:
        fields = {name.replace("_", "-"): value for name, value in client.status().items()}
    print_fields(fields, output)


@access.command(name="list")
def list_access(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """List what each principal may do with keys."""
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
            help=f"All that it may do from now on, out of: {', '.join(p.value for p in Permission)}; "
            "'use' and 'administer' stand for those that use keys, and for the others.",
            show_default=False,
        ),
    ],
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Let a principal do exactly this with keys."""
    granted = _permissions(permissions)
    with _client(credential) as client:
        granted = client.set_permissions(name, granted)
    print_fields({"principal": name, "permissions": _names(granted, output)}, output)


@access.command(name="remove")
def remove_access(
    name: PrincipalName,
    permissions: Annotated[
        list[str] | None,
        typer.Argument(help="What it may do no longer.", show_default="all of it"),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Let a principal do something with keys no longer. This holds at once."""
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
    file: Annotated[Path, typer.Option("--file", help="The credential file to make.", show_default=False)],
    role: Annotated[str, typer.Option("--role", help=f"One of {', '.join(r.value for r in Role)}.")] = "none",
    days: Annotated[
        int | None,
        typer.Option("--days", help="How long it is let in.", show_default="for good", min=1, max=36500),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a principal and its credential file. It may do nothing with keys until that is granted."""
    try:
        chosen = Role(role)
    except ValueError as exc:
        raise InvalidValueError(f"a role is one of {', '.join(r.value for r in Role)}, not {role!r}") from exc
    expires = None if days is None else int(datetime.now(UTC).timestamp()) + days * 86400
    with _client(credential) as client:
        made = client.new_credential_file(file, name, role=chosen, expires=expires)
        fields = _fields(client.get_principal(made.client_id))
    print_fields(fields | {"file": str(file)}, output)


@principal.command(name="disable")
def disable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Let a principal in no longer, until it is enabled again. This holds at once."""
    with _client(credential) as client:
        client.change_principal(name, enabled=False, expires=client.get_principal(name).expires)
    typer.echo(f"disabled principal {name}")


@principal.command(name="enable")
def enable_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Let a principal in again."""
    with _client(credential) as client:
        client.change_principal(name, enabled=True, expires=client.get_principal(name).expires)
    typer.echo(f"enabled principal {name}")


@principal.command(name="delete")
def delete_principal(name: PrincipalName, credential: Credential = None) -> None:
    """Forget a principal and what it may do. This holds at once."""
    with _client(credential) as client:
        client.delete_principal(name)
    typer.echo(f"deleted principal {name}")


@hsm.command(name="add")
def add_hsm(
    directory: Directory = None,
    hsm_uri: HsmUri = None,
    hsm_module: HsmModule = None,
    hsm_pin_file: HsmPinFile = None,
) -> None:
    """Give a vault that has no token one, while it is not served. It is a premium vault from then on."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.hsm.access import add_hsm

    vault = VaultDirectory(_directory(directory))
    add_hsm(vault, _hsm_options(hsm_uri, hsm_module, hsm_pin_file))
    _print_hsm(vault)


@hsm.command(name="unlock")
def unlock_hsm(directory: Directory = None) -> None:
    """Forget wrong PINs, after which the token is not asked any more, and try the one that there is now."""
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.hsm.access import unlock_hsm

    unlock_hsm(VaultDirectory(_directory(directory)))
    typer.echo("the token takes the PIN")


def _hsm_options(uri: str | None, module: str | None, pin_file: Path | None) -> dict[str, str]:
    if uri is None:
        if module is not None or pin_file is not None:
            raise InvalidValueError("--hsm-module and --hsm-pin-file are of the token that --hsm-uri names")
        return {}
    options = {"uri": uri}
    if module is not None:
        options["module"] = module
    if pin_file is not None:
        options["pin-file"] = str(pin_file.absolute())
    return options


def _print_hsm(vault: VaultDirectory) -> None:
    hsm = vault.settings().hsm
    if hsm is None:
        return
    if hsm.options:
        typer.echo(f"keeps RSA-HSM keys in {hsm.options['uri']}")
    else:
        typer.echo(f"back up {vault.hsm_path} too: it is a token with the vault's RSA-HSM keys, and its PIN")


def _directory(given: Path | None) -> Path:
    return (given or session.config().state_directory / "vault").absolute()


def _client(credential: Path | None) -> VaultClient:
    from virt_sse.vault_client.administration import VaultClient

    return VaultClient(credential_path(credential))


def credential_path(given: Path | None) -> Path:
    """The credential file *given*, or that of the administrator of this host's vault."""
    return given or _directory(None) / "administrator.json"


def _permissions(names: list[str]) -> frozenset[Permission]:
    groups = {"use": USE, "administer": ADMINISTRATION}
    by_name = {permission.value.lower(): frozenset({permission}) for permission in Permission} | groups
    chosen: frozenset[Permission] = frozenset()
    for name in names:
        if name.lower() not in by_name:
            raise InvalidValueError(
                f"no permission {name!r}", hint=f"there are {', '.join(p.value for p in Permission)}"
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
