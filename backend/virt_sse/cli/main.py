"""The root of the command line. Errors are printed here, and nowhere else."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import sys
from collections.abc import Collection
from typing import Annotated

import typer

import virt_sse
from virt_sse.cli import command_tree, completion, global_options, session, streams
from virt_sse.cli.tracebacks import print_traceback
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
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
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
        quiet: global_options.Quiet = False,
        verbose: global_options.Verbose = False,
        debug: global_options.Debug = False,
        wide: global_options.Wide = False,
    ) -> None:
        global_options.apply(quiet=quiet, verbose=verbose, debug=debug, wide=wide)

    app.command(name="completion")(completion.completion)
    for noun, text in _NOUNS.items():
        group = typer.Typer(rich_markup_mode=None)
        if noun in nouns:
            group = importlib.import_module(f"virt_sse.cli.{noun}").app
        app.add_typer(group, name=noun, help=text)
    plugins.add_commands(app)
    command_tree.use_classes(app)
    return app


def _wanted_nouns() -> Collection[str]:
    """The nouns among the words of the command line, also of a command line to be completed."""
    words = completion.words() if completion.is_wanted() else sys.argv[1:]
    return {word for word in words if word in _NOUNS}


def _print_version(wanted: bool) -> None:
    """Print the version and exit. ``is_eager`` calls this before a missing command is an error."""
    if wanted:
        typer.echo(f"virt-sse {virt_sse.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of ``virt-sse``, also of agent and vault; exits 1 on errors, 2 on wrong usage."""
    streams.prepare()
    streams.restrict_umask()
    atexit.register(gc.freeze)  # the interpreter would look at every object once more before it ends
    logging.basicConfig(format="virt-sse: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        protect_memory()
        plugins = PluginHost(config := Config.load())
        app = build(plugins, _wanted_nouns())
        with session.use(config, plugins):
            if completion.is_wanted():
                completion.answer(app)
            for error in plugins.broken:
                report(error)
            sys.exit(command_tree.run(app))
    except VirtSseError as exc:
        sys.exit(_failed(exc, exc))
    except ModuleNotFoundError as exc:
        if (missing := extra_error(exc)) is None:
            raise
        sys.exit(_failed(missing, exc))


def _failed(error: VirtSseError, cause: Exception) -> int:
    """Print *error*: the exit status. A shell that asks for completions gets none."""
    if completion.is_wanted():
        return 0
    if global_options.chosen.debug:
        print_traceback(cause)
    report(error)
    return _USAGE if isinstance(error, InvalidValueError) else 1
