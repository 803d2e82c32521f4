"""``virt-sse host``."""

from __future__ import annotations

import typer

from virt_sse.cli.session import backend

app = typer.Typer(help="This host.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """A group also while it has one command."""


@app.command()
def init() -> None:
    """Make the platform's keyring and install libvirt's hook, unless they are there."""
    with backend() as b:
        made = b.init_host()
    for thing in made:
        typer.echo(f"made {thing}")
    if any("hook" in thing for thing in made):
        typer.echo("restart libvirtd (or virtqemud): it looks for hooks only when it starts")
    if not made:
        typer.echo("nothing to do")
