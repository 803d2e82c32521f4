"""``virt-sse store``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.output import Output, OutputFormat, note, print_rows

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """A callback keeps ``store`` a group of commands."""


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to create.", show_default=False)],
) -> None:
    """Copy the store to a file, also while agents and other commands run.

    The file is an SQLite database, also if the store is in PostgreSQL.
    """
    from virt_sse.host.backup import back_up_store

    back_up_store(session.config(), file)
    note(f"made {file}")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file made by 'store backup'.", show_default=False)],
) -> None:
    """Restore the store of a host that has none, while the agent is stopped.

    In PostgreSQL, the database must have no row.
    """
    from virt_sse.host.backup import restore_store

    restore_store(session.config(), file)
    note("restored the store; 'virt-sse disk check' finds disks that changed since the backup")


@app.command()
def migrate(
    to_url: Annotated[
        str, typer.Argument(help="The new database, as url in [store] of config.toml.", show_default=False)
    ],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Move the store into another database, e.g. from SQLite to PostgreSQL; running domains go on.

    Stop the agents of all hosts first. All rows are copied, and compared with the old store. The old store is
    kept, and refused by every command from then on. Set the new URL in config.toml afterwards. If the command
    is interrupted, repeat the command: the old store stays in charge, or the move is finished.
    """
    from virt_sse.host.store_migration import migrate_store

    found = migrate_store(session.config(), to_url)
    rows = [{"table": name, "rows": each.rows, "sha-256": each.digest} for name, each in found.items()]
    print_rows(rows, ["table", "rows", "sha-256"], output)
    path = session.config().root / "etc/virt-sse/config.toml"
    note(f"moved the store; set url in [store] of {path} on every host, then start the agents", err=True)
