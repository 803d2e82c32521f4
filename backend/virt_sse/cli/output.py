"""How commands print: plain aligned columns or JSON on standard output, warnings on standard error."""

from __future__ import annotations

import enum
import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import typer

from virt_sse.cli.global_options import chosen
from virt_sse.cli.tables import format_table
from virt_sse.errors import printable


class OutputFormat(enum.Enum):
    """Values of ``--output``."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="Output format.")]


def print_rows(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str],
    output: OutputFormat,
    *,
    wide: Collection[str] = (),
) -> None:
    """Print *rows*: a table has the *columns* only, JSON has all fields.

    An empty cell of a table is ``-``: every line of a listing has the same number of words. On a terminal,
    long cells are shortened until the table fits, unless ``--wide`` is given.

    :param wide: columns that a table has with ``--wide`` only, or in a pipe.
    """
    if output is OutputFormat.JSON:
        print_json(rows)
        return
    if is_narrow():
        columns = [column for column in columns if column not in wide]
    table = [[column.upper() for column in columns]]
    table += [[_cell(row[column]) for column in columns] for row in rows]
    for line in format_table(table, shutil.get_terminal_size().columns if is_narrow() else None):
        typer.echo(line)


def is_narrow() -> bool:
    """Whether tables have to fit a terminal: what a program or a file gets is never shortened."""
    return sys.stdout.isatty() and not chosen.wide


def _cell(value: object) -> str:
    """Text for a terminal; names may come from an image or a server."""
    return "-" if value in (None, "") else printable(str(value))


def print_fields(fields: Mapping[str, object], output: OutputFormat) -> None:
    """Print a single object, a line per field."""
    if output is OutputFormat.JSON:
        print_json(fields)
        return
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        for line in values or [None]:
            text = (
                printable(" ".join(f"{k}={v}" for k, v in line.items()))
                if isinstance(line, dict)
                else _cell(line)
            )
            typer.echo(f"{name.ljust(width)}  {text}")
            name = ""  # a list's further lines have no name in front


def print_json(document: object) -> None:
    """Print *document* as JSON."""
    typer.echo(json.dumps(document, indent=2))


def note(text: str, *, err: bool = False) -> None:
    """Print what a command has done, unless ``--quiet`` is given.

    :param err: print to standard error, beside a table or JSON.
    """
    if not chosen.quiet:
        typer.echo(text, err=err)


def warn(text: str) -> None:
    """Print a warning to standard error, unless ``--quiet`` is given."""
    if not chosen.quiet:
        typer.echo(f"virt-sse: warning: {printable(text)}", err=True)


def human_size(size: int) -> str:
    """*size* bytes with the largest binary unit that divides it."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def human_rate(bytes_per_second: float) -> str:
    """A rate, in binary units."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if bytes_per_second >= 1 << shift:
            return f"{bytes_per_second / (1 << shift):.1f} {unit}/s"
    return f"{bytes_per_second:.0f} B/s"


def human_time(seconds: float) -> str:
    """A duration as ``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
