"""``virt-sse key``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import vault_keys
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend
from virt_sse.cli.vault_options import Credential
from virt_sse.errors import VirtSseError
from virt_sse.model.keys import KeyRef

if TYPE_CHECKING:
    from virt_sse.keys.rewrap import RewrapReport

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(vault_keys.app)

Provider = Annotated[str, typer.Option("--provider", help="The key provider.", show_default=False)]
KeyName = Annotated[str, typer.Argument(help="The key's name.")]


@app.command()
def used(output: Output = OutputFormat.TABLE) -> None:
    """List the keys of this host's disks, by version."""
    with backend() as b:
        rows = [
            {
                "provider": use.key.provider,
                "name": use.key.name,
                "version": use.key.version,
                "state": use.state.value,
                "encryption-set": str(use.set_id) if use.set_id else None,
                "deks": use.deks,
            }
            for use in b.keys.in_use()
        ]
    print_rows(rows, ("provider", "name", "version", "state", "encryption-set", "deks"), output)


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(help="The key's name.")] = "default",
    provider: Annotated[
        str | None,
        typer.Option("--provider", help="The key provider; default: the key vault.", show_default=False),
    ] = None,
    credential: Credential = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a new version of a key. With --provider, rewrap the DEKs of the key's disks as well.

    DEKs under a vault's key are rewrapped by 'virt-sse des rotate', or by automatic rotation.
    """
    if provider is None:
        url = vault_keys.rotate(name, credential)
        if output is OutputFormat.JSON:
            print_fields({"key": url}, output)
        else:
            note(f"made {url}")
        return
    with backend() as b, progress_bar("rewrapping") as progress:
        version, report = b.keys.rotate(KeyRef(provider, name), progress=progress)
    print_report({"key": str(version)}, report, output, again=f"key rewrap {name} --provider {provider}")


@app.command()
def rewrap(name: KeyName = "default", *, provider: Provider, output: Output = OutputFormat.TABLE) -> None:
    """Rewrap the DEKs of a key's disks with its current version, e.g. after an interrupted rotation."""
    with backend() as b, progress_bar("rewrapping") as progress:
        report = b.keys.rewrap(KeyRef(provider, name), progress=progress)
    fields = {"key": f"{provider}:{name}"}
    print_report(fields, report, output, again=f"key rewrap {name} --provider {provider}")


def print_report(
    fields: Mapping[str, object], report: RewrapReport, output: OutputFormat, *, again: str
) -> None:
    """Print what was rewrapped.

    :param again: the command that rewraps the rest.
    :raise VirtSseError: When DEKs are not rewrapped.
    """
    failed = [{"disk": disk, "reason": reason} for disk, reason in report.failed.items()]
    counts = {"rewrapped": report.rewrapped, "current": report.current, "failed": failed}
    print_fields({**fields, **counts}, output)
    if failed:
        raise VirtSseError(
            f"{len(failed)} of the disks could not be rewrapped",
            hint=f"their DEKs are unchanged; 'virt-sse {again}' rewraps them",
        )
