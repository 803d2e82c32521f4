"""Options of every command, before or behind its name: how much a command says, and how."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from virt_sse.errors import InvalidValueError
from virt_sse.system.tools import STEP

_LOGGERS = ("virt_sse", "virt_sse_plugins")
"""Libraries stay at ``WARNING``: qemu.qmp logs whole QMP commands, secrets included."""


@dataclass
class GlobalOptions:
    """What the user wants to see.

    :ivar quiet: errors and the requested data only: no notes, warnings and progress.
    :ivar verbose: also each tool that was run, and its time.
    :ivar debug: as *verbose*, with the tools' arguments and with tracebacks.
    :ivar wide: tables with whole values and all columns.
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    wide: bool = False


chosen = GlobalOptions()
"""The options of the command that this process runs."""

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors and the requested data only: no notes, no progress."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also print each tool that is run, and its time.")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="As --verbose, with the tools' arguments and with tracebacks.")
]
Wide = Annotated[
    bool,
    typer.Option("--wide", help="Shorten nothing in tables. Tables fit a terminal; a pipe gets all anyway."),
]

DECLARATIONS = {
    "quiet": ("--quiet", "-q"),
    "verbose": ("--verbose", "-v"),
    "debug": ("--debug",),
    "wide": ("--wide",),
}
"""The spellings of the options, by the attributes of :class:`GlobalOptions`."""


def choose(_context: Any, parameter: Any, value: bool) -> None:
    """Note an option that was given (callback of typer)."""
    if value:
        apply(**{parameter.name: True})


def apply(**given: bool) -> None:
    """Note the options that are true.

    :raise InvalidValueError: When options exclude each other.
    """
    names = {name for options in (vars(chosen), given) for name, value in options.items() if value}
    if "quiet" in names and names & {"verbose", "debug"}:
        raise InvalidValueError("--quiet excludes --verbose and --debug")
    for name in names:
        setattr(chosen, name, True)
    if chosen.quiet:
        logging.getLogger().setLevel(logging.ERROR)
    elif chosen.debug or chosen.verbose:
        logging.addLevelName(STEP, "DEBUG")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.DEBUG if chosen.debug else STEP)
