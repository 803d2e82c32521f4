"""``virt-sse vault``."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import vault_access, vault_hsm, vault_instances, vault_principals, vault_sealing
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, warn
from virt_sse.cli.vault_hsm import HsmModule, HsmPinFile, HsmUri, HsmUser, hsm_options, print_hsm
from virt_sse.cli.vault_options import (
    Credential,
    Database,
    Directory,
    database_url,
    open_client,
    vault_folder,
)
from virt_sse.cli.vault_sealing import (
    NEEDS_SEALING_KEY,
    NewKey,
    SealModule,
    SealPinFile,
    SealUri,
    SealUser,
    sealing_key,
)
from virt_sse.errors import InvalidValueError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(vault_access.app, name="access")
app.add_typer(vault_principals.app, name="principal")
app.add_typer(vault_hsm.app, name="hsm")
app.command(name="export-root")(vault_instances.export_root)
app.command(name="import-root")(vault_instances.import_root)
app.command(name="seal-root")(vault_sealing.seal_root)
app.command(name="unseal-root")(vault_sealing.unseal_root)

_PORT, _HOSTS = 8443, ["localhost", "127.0.0.1"]


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
    audience: Annotated[
        str | None,
        typer.Option(
            "--audience",
            help="A parent domain of the host, for Azure's stock clients with their challenge check on.",
            show_default="the vault's URL",
        ),
    ] = None,
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
    database: Database = None,
    seal_uri: SealUri = None,
    seal_module: SealModule = None,
    seal_pin_file: SealPinFile = None,
    seal_user: SealUser = None,
    new_seal_key: NewKey = False,
) -> None:
    """Create a vault: root key, certificates, database, and an administrator's credential file."""
    from virt_sse.vault.home.settings import Tier
    from virt_sse.vault.initialise import initialise

    try:
        chosen = Tier(tier)
    except ValueError as exc:
        raise InvalidValueError(f"invalid tier {tier!r}: choose standard or premium") from exc
    if new_seal_key and seal_uri is None:
        raise InvalidValueError("--new-seal-key needs --seal-uri")
    made = initialise(
        vault_folder(directory),
        name=name,
        hosts=host or _HOSTS,
        port=port,
        audience=audience,
        tier=chosen,
        tenant=tenant,
        retention_days=retention_days,
        purge_protection=purge_protection,
        hsm=hsm_options(hsm_uri, hsm_module, hsm_pin_file, hsm_user),
        database=database_url(database),
        sealed_by=sealing_key(seal_uri, seal_module, seal_pin_file, seal_user),
        new_key=new_seal_key,
    )
    root_path = made.root_key_path if seal_uri is None else made.sealed_root_path
    note(f"made vault {made.settings().url} in {made.path}")
    note(f"made {made.administrator_path}: keep it secret, it administers the vault")
    note(
        f"back up {root_path} and, with 'virt-sse vault backup', {made.database_path} separately: "
        "the vault's keys are lost without either file"
        if database is None
        else "back up the database with pg_dump, and the rest with 'virt-sse vault export-root': the vault's "
        "keys are lost without either"
    )
    if seal_uri is not None:
        note(NEEDS_SEALING_KEY)
    print_hsm(made)
    if _is_taken(port):
        warn(
            f"another program listens on port {port} of this machine; "
            "'virt-sse vault serve --port PORT' listens on another port"
        )


def _is_taken(port: int) -> bool:
    """Whether a program on this machine listens on the address and port of ``vault serve``."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOSTS[-1], port))
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


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
        vault_folder(directory),
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

    add_administrator(VaultDirectory(vault_folder(directory)), name, file)
    note(f"made {file}: keep it secret, it administers the vault")


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to create.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Copy the vault's database, on the vault's machine, also while the vault is served."""
    from virt_sse.vault.backup import back_up
    from virt_sse.vault.home.layout import VaultDirectory
    from virt_sse.vault.root_key import is_sealed

    vault = VaultDirectory(vault_folder(directory))
    back_up(vault, file)
    root_key = vault.sealed_root_path if is_sealed(vault) else vault.root_key_path
    note(f"made {file}: back up {root_key} too, apart from it")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file made by 'vault backup'.", show_default=False)],
    directory: Directory = None,
) -> None:
    """Restore the database of a vault that has none, while the vault is not served."""
    from virt_sse.vault.backup import restore as restore_vault
    from virt_sse.vault.home.layout import VaultDirectory

    vault = VaultDirectory(vault_folder(directory))
    restore_vault(vault, file)
    note(f"made {vault.database_path}: review 'vault access list', which may have revoked permissions again")


@app.command()
def status(credential: Credential = None, output: Output = OutputFormat.TABLE) -> None:
    """Show the vault's settings and numbers of keys and principals."""
    with open_client(credential) as client:
        fields = {name.replace("_", "-"): value for name, value in client.status().items()}
    print_fields(fields, output)
