"""Commands that destroy, or make something unusable: asked about on a terminal, or described without effect.

A command made with :class:`DestructiveCommand` has the options ``--yes`` and ``--dry-run``, and calls
:func:`confirm` once all is checked and before anything changes. Scripts, without a terminal, are not asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperOption

from virt_sse.cli.command_tree import HelpfulCommand


@dataclass
class _Chosen:
    """The options of the command that this process runs."""

    yes: bool = False
    dry_run: bool = False


_chosen = _Chosen()
DECLARATIONS = {
    "yes": (("--yes", "-y"), "Do not ask whether to go on."),
    "dry_run": (("--dry-run",), "Check, say what would be done, and change nothing."),
}
"""Spellings and help of the options, by the attributes of :class:`_Chosen`."""


class DestructiveCommand(HelpfulCommand):
    """A command with ``--yes`` and ``--dry-run``, for ``@app.command(cls=DestructiveCommand)``."""

    def __init__(self, *arguments: Any, params: list[Any] | None = None, **options: Any) -> None:
        own = [
            TyperOption(
                param_decls=list(spellings),
                is_flag=True,
                default=False,
                expose_value=False,
                help=text,
                callback=_choose,
            )
            for spellings, text in DECLARATIONS.values()
        ]
        super().__init__(*arguments, params=[*(params or ()), *own], **options)


def _choose(_context: Any, parameter: Any, value: bool) -> None:
    setattr(_chosen, parameter.name, value)


def is_dry_run() -> bool:
    """Whether the command only says what would be done; for commands with a report of their own."""
    return _chosen.dry_run


def confirm(plan: Callable[[], Sequence[str]], *, asks: bool = True, always: bool = False) -> None:
    """In a dry run, print what would be done, and end the command; on a terminal, ask whether to go on.

    :param plan: what will be done, each a phrase like ``erase disk web``. Checks what the command itself
        checks later, and raises the same errors; not called for a script, which is told by the command.
    :param asks: whether the plan loses anything, so that the user is asked.
    :param always: ask also without a terminal.
    :raise typer.Exit: In a dry run.
    :raise typer.Abort: When the answer is no.
    """
    if _chosen.dry_run:
        for each in plan():
            typer.echo(f"would {each}")
        raise typer.Exit
    if asks and not _chosen.yes and (always or (sys.stdin.isatty() and sys.stderr.isatty())):
        typer.confirm("; ".join(plan()) + "?", abort=True, err=True)
