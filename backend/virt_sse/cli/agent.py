"""``virt-sse agent``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def run() -> None:
    """Run this host's agent until SIGTERM."""
    from virt_sse.agent import agent, logs

    logs.set_up()
    agent.run(session.config(), session.plugins())


@app.command()
def status(output: Output = OutputFormat.TABLE) -> None:
    """Show the status of this host's agent."""
    from virt_sse.agent_client import ask

    config = session.config()
    document = json.loads(ask(config.agent_socket, "GET", "/status", timeout=config.agent.timeout))
    if output is OutputFormat.JSON:
        print_json(document)
    else:
        print_fields(document, output)


@app.command()
def units(
    directory: Annotated[
        Path, typer.Argument(help="Directory of the units, e.g. /etc/systemd/system.", show_default=False)
    ],
) -> None:
    """Write systemd units for the agent and the embedded key vault."""
    from virt_sse.agent.systemd import write_units

    for path in write_units(directory, session.config()):
        typer.echo(f"made {path}")
    typer.echo("next: systemctl daemon-reload; systemctl enable --now virt-sse-agent.socket virt-sse-agent")
