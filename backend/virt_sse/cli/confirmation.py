"""Questions on a terminal before data is lost. Scripts, without a terminal, are not asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask on a terminal.")]


def confirm(question: Callable[[], str], *, yes: bool, dry_run: bool = False) -> None:
    """Ask whether to go on, unless the user has said so, nothing will happen, or there is no terminal.

    :param question: makes the question, which names what will be lost.
    :raise typer.Abort: When the answer is no.
    """
    if not (yes or dry_run) and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm(question(), abort=True, err=True)
