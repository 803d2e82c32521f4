"""``virt-sse agent``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_json

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
def page(output: Output = OutputFormat.TABLE) -> None:
    """Print the address of this host's web page: a link, valid once and for ten minutes.

    The agent serves the read-only page at a Unix socket for root and, with 'group' in [page], for a group's
    members; with 'listen = "127.0.0.1:PORT"' in [page] on loopback, too. From another machine: ssh -L.
    """
    from virt_sse.page.access import new_code, read_token
    from virt_sse.system.extras import require

    require("page", "the page")
    config = session.config()
    link = None
    if config.page.listen:
        link = f"http://{config.page.listen}/?token={new_code(read_token(config.page_token))}"
    if output is OutputFormat.JSON:
        print_json({"socket": str(config.page_socket), "listen": config.page.listen, "link": link})
        return
    if link:
        typer.echo(link)
        return
    typer.echo(f"The page is at the Unix socket {config.page_socket}. To look at it from your machine:")
    typer.echo(f"  ssh -L 8088:{config.page_socket} root@HOST, then open http://localhost:8088/")
    typer.echo("For a link on this host, set 'listen = \"127.0.0.1:8088\"' in [page] of the configuration,")
    typer.echo("and restart the agent.")


@app.command()
def units(
    directory: Annotated[
        Path, typer.Argument(help="Directory of the units, e.g. /etc/systemd/system.", show_default=False)
    ],
) -> None:
    """Write systemd units for the agent and the embedded key vault."""
    from virt_sse.agent.systemd import write_units

    for path in write_units(directory, session.config()):
        note(f"made {path}")
    note("next: systemctl daemon-reload; systemctl enable --now virt-sse-agent.socket virt-sse-agent")
