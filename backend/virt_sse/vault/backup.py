"""Backup and restore of a vault's database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from virt_sse.errors import VaultError
from virt_sse.system.database_url import sqlite_url
from virt_sse.system.files import publish
from virt_sse.system.sqlite_backup import candidate_path, copy_database, present_files, remove_database
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.root_key import check_root_key, read_root_key


def back_up(directory: VaultDirectory, file: Path) -> None:
    """Copy the vault's database to *file*, also while the vault is served. The root key is not copied.

    :param file: must not exist.
    :raise VaultError: When there is no vault, its database is in PostgreSQL, *file* exists, or a file cannot
        be read or written.
    """
    _require_sqlite(directory.settings(), "backed up by pg_dump")
    _copy(directory.database_path, file, "back up the vault to")


def restore(directory: VaultDirectory, file: Path) -> None:
    """Make the backup in *file* the database of a vault that has none.

    :raise VaultError: When there is no vault, its database is in PostgreSQL, a process serves the vault, the
        vault has a database, or *file* is not a backup of this vault's database.
    """
    settings = directory.settings()
    _require_sqlite(settings, "restored by pg_restore")
    with directory.lock():
        candidate = candidate_path(directory.database_path)
        present = present_files(directory.database_path)
        if present:
            raise VaultError(
                f"the vault has a database: {', '.join(str(path) for path in present)}",
                hint="move all of these files away first",
            )
        try:
            _copy(file, candidate, "restore the vault from")
            check_root_key(sqlite_url(candidate), read_root_key(directory, settings))
            publish(candidate, directory.database_path)
        except OSError as exc:
            raise VaultError(f"cannot restore the vault from {file}: {exc.strerror}") from exc
        finally:
            remove_database(candidate)


def _require_sqlite(settings: VaultSettings, instead: str) -> None:
    if settings.database is not None:
        raise VaultError(
            f"the vault's database is in PostgreSQL, and is {instead}",
            hint="'virt-sse vault export-root' copies the rest of the vault: root key, CA and settings",
        )


def _copy(source: Path, target: Path, doing: str) -> None:
    named = target if doing.endswith("to") else source
    try:
        copy_database(source, target)
    except OSError as exc:
        raise VaultError(f"cannot {doing} {named}: {exc.strerror}") from exc
    except sqlite3.Error as exc:
        raise VaultError(f"cannot {doing} {named}: {exc}") from exc
