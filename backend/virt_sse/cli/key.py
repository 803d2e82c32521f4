"""``virt-sse key``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows, progress_bar
from virt_sse.cli.session import backend
from virt_sse.errors import VirtSseError
from virt_sse.keys import KeyRef

if TYPE_CHECKING:
    from virt_sse.rotation import RewrapReport

app = typer.Typer(help="The keys that disks are under.", no_args_is_help=True, rich_markup_mode=None)

Provider = Annotated[str, typer.Option("--provider", help="The key provider.", show_default=False)]
KeyName = Annotated[str, typer.Option("--name", help="The key's name there.")]


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List the keys that disks are under, by version."""
    with backend() as b:
        rows = [
            {
                "provider": key.provider,
                "name": key.name,
                "version": key.version,
                "state": b.plugins.key_provider(key.provider).key_state(key).value,
                "deks": deks,
            }
            for key, deks in b.keys_in_use().items()
        ]
    print_rows(rows, ("provider", "name", "version", "state", "deks"), output)


@app.command()
def rotate(provider: Provider, name: KeyName = "default", output: Output = OutputFormat.TABLE) -> None:
    """Make a new version of a key and rewrap every disk's DEK with it. Guests notice nothing."""
    with backend() as b, progress_bar("rewrapping") as progress:
        version, report = b.rotate_key(KeyRef(provider, name), progress=progress)
    _print_report({"key": str(version)}, report, output)


@app.command()
def rewrap(provider: Provider, name: KeyName = "default", output: Output = OutputFormat.TABLE) -> None:
    """Bring every disk under a key to its current version, e.g. after a rotation that was cut off."""
    with backend() as b, progress_bar("rewrapping") as progress:
        report = b.rewrap(KeyRef(provider, name), progress=progress)
    _print_report({"key": f"{provider}:{name}"}, report, output)


def _print_report(fields: dict[str, object], report: RewrapReport, output: OutputFormat) -> None:
    failed = [{"disk": disk, "reason": reason} for disk, reason in report.failed.items()]
    print_fields(
        fields | {"rewrapped": report.rewrapped, "current": report.current, "failed": failed}, output
    )
    if failed:
        raise VirtSseError(
            f"{len(failed)} of the disks could not be rewrapped",
            hint="their DEKs are as they were; 'virt-sse key rewrap' goes on with what is left",
        )
