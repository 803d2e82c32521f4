"""How commands print: plain aligned columns or JSON on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.errors import printable

if TYPE_CHECKING:
    from virt_sse.system.progress import Progress


class OutputFormat(enum.Enum):
    """Values of ``--output``."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="Output format.")]


def print_rows(rows: Sequence[Mapping[str, object]], columns: Sequence[str], output: OutputFormat) -> None:
    """Print *rows*: a table has the *columns* only, JSON has all fields.

    An empty cell of a table is ``-``: every line of a listing has the same number of words.
    """
    if output is OutputFormat.JSON:
        print_json(rows)
        return
    table = [[column.upper() for column in columns]]
    table += [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


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


@contextlib.contextmanager
def progress_bar(what: str, *, size: int | None = None) -> Iterator[Progress]:
    """A progress bar on standard error; without a terminal, nothing is shown.

    :param size: bytes of the whole operation, to show the throughput.
    """
    if not sys.stderr.isatty():
        yield lambda _fraction: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TransferSpeedColumn

    columns = Bars.get_default_columns()
    with Bars(
        *columns, *([TransferSpeedColumn()] if size else []), console=Console(stderr=True), transient=True
    ) as bars:
        task = bars.add_task(what, total=size or 1.0)
        yield lambda fraction: bars.update(task, completed=fraction * (size or 1.0))


def human_size(size: int) -> str:
    """*size* bytes with the largest binary unit that divides it."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)
