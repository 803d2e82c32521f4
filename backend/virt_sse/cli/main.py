"""The root of the command line. Errors are printed here, and nowhere else."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import virt_sse
from virt_sse.cli import agent, audit, des, disk, host, image, key, session, snapshot, streams, vault, vm
from virt_sse.config import Config
from virt_sse.errors import InvalidValueError, VirtSseError, report
from virt_sse.plugins import PluginHost
from virt_sse.system.process_hardening import protect_memory

_USAGE = 2


def build(plugins: PluginHost) -> typer.Typer:
    """Build the whole command line, with the commands of plugins."""
    app = typer.Typer(
        name="virt-sse",
        help="Server-side encryption for the disks of libvirt guests.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        _version: Annotated[
            bool,
            typer.Option(
                "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
            ),
        ] = False,
    ) -> None:
        pass

    app.add_typer(agent.app, name="agent")
    app.add_typer(audit.app, name="audit")
    app.add_typer(des.app, name="des")
    app.add_typer(disk.app, name="disk")
    app.add_typer(host.app, name="host")
    app.add_typer(image.app, name="image")
    app.add_typer(key.app, name="key")
    app.add_typer(snapshot.app, name="snapshot")
    app.add_typer(vault.app, name="vault")
    app.add_typer(vm.app, name="vm")
    plugins.add_commands(app)
    return app


def _print_version(wanted: bool) -> None:
    """Print the version and exit. ``is_eager`` calls this before a missing command is an error."""
    if wanted:
        typer.echo(f"virt-sse {virt_sse.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of ``virt-sse``, also of agent and vault; exits 1 on errors, 2 on wrong usage."""
    streams.prepare()
    streams.restrict_umask()
    logging.basicConfig(format="virt-sse: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        protect_memory()
        plugins = PluginHost(config := Config.load())
        app = build(plugins)
        for error in plugins.broken:
            report(error)
        with session.use(config, plugins):
            app()
    except InvalidValueError as exc:
        report(exc)
        sys.exit(_USAGE)
    except VirtSseError as exc:
        report(exc)
        sys.exit(1)
