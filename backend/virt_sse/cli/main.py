"""The root of the command line. Errors are printed here, and nowhere else."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Collection
from typing import Annotated

import typer

import virt_sse
from virt_sse.cli import session, streams
from virt_sse.config import Config
from virt_sse.errors import InvalidValueError, VirtSseError, report
from virt_sse.plugins import PluginHost
from virt_sse.system.extras import extra_error
from virt_sse.system.process_hardening import protect_memory

_USAGE = 2
_NOUNS = {
    "agent": "The daemon that serves the libvirt hook and watches keys.",
    "audit": "The record of every key use, allowed or refused.",
    "certificate": "Certificates about deleted disks.",
    "des": "Disk encryption sets.",
    "disk": "Encrypted disks.",
    "host": "This host.",
    "image": "Images: encrypted templates of disks.",
    "key": "The keys of this host's disks, and the keys in a key vault.",
    "snapshot": "Snapshots of disks.",
    "store": "The index of all disks, in SQLite or PostgreSQL.",
    "vault": "The embedded key vault.",
    "vm": "Virtual machines: libvirt's domains.",
    "vmss": "Scale sets: many domains from one definition and one disk.",
}
"""The nouns with their help texts; the commands of a noun are in the module of the same name."""


def build(plugins: PluginHost, nouns: Collection[str] = tuple(_NOUNS)) -> typer.Typer:
    """Build the command line, with the commands of plugins.

    :param nouns: the nouns whose commands are loaded. The other nouns have their help texts only: loading and
        building all commands takes longer than most commands.
    """
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

    for noun, text in _NOUNS.items():
        group = typer.Typer(rich_markup_mode=None)
        if noun in nouns:
            group = importlib.import_module(f"virt_sse.cli.{noun}").app
        app.add_typer(group, name=noun, help=text)
    plugins.add_commands(app)
    return app


def _wanted_nouns() -> Collection[str]:
    """The nouns among the words of the command line; all nouns if the shell asks for completions."""
    if "_VIRT_SSE_COMPLETE" in os.environ:
        return _NOUNS
    return {word for word in sys.argv[1:] if word in _NOUNS}


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
        app = build(plugins, _wanted_nouns())
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
    except ModuleNotFoundError as exc:
        missing = extra_error(exc)
        if missing is None:
            raise
        report(missing)
        sys.exit(1)
