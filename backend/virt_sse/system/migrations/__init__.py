"""Database schemas, versioned by Alembic. Each database has a folder of migrations of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection

if TYPE_CHECKING:
    from alembic.config import Config


class UnknownRevisionError(Exception):
    """No migration leads from the database's revision to the wanted revision."""


def revision_of(connection: Connection) -> str | None:
    """Read the revision of a database; ``None`` if Alembic never migrated it."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision


def upgrade(connection: Connection, versions: Path, head: str) -> None:
    """Migrate a database to the revision *head*, in the transaction of *connection*.

    Alembic takes 0.1 s to import, so an up-to-date database does without it.

    :param versions: the folder of the migrations.
    :param head: the newest of them.
    :raise UnknownRevisionError: When the database has a revision without a migration in *versions*.
    """
    if revision_of(connection) == head:
        return
    import alembic.command
    import alembic.util.exc

    try:
        alembic.command.upgrade(alembic_config(versions, connection), head)
    except alembic.util.exc.CommandError as exc:
        raise UnknownRevisionError(str(exc)) from exc


def alembic_config(versions: Path, connection: Connection | None = None) -> Config:
    """Configure Alembic for the migrations in the folder *versions*."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    return config
