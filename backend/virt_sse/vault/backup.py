"""Backup and restore of a vault's database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from virt_sse.errors import VaultError
from virt_sse.system.files import publish
from virt_sse.system.sqlite_backup import candidate_path, copy_database, present_files, remove_database
from virt_sse.vault.home.database import Database
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import TOKENS
from virt_sse.vault.identity.tokens import signing_key


def back_up(directory: VaultDirectory, file: Path) -> None:
    """Copy the vault's database to *file*, also while the vault is served. The root key is not copied.

    :param file: must not exist.
    :raise VaultError: When there is no vault, *file* exists, or a file cannot be read or written.
    """
    directory.settings()
    _copy(directory.database_path, file, "back up the vault to")


def restore(directory: VaultDirectory, file: Path) -> None:
    """Make the backup in *file* the database of a vault that has none.

    :raise VaultError: When there is no vault, a process serves the vault, the vault has a database, or
        *file* is not a backup of this vault's database.
    """
    settings = directory.settings()
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
            with closing(Database(candidate)) as database:
                signing_key(database, directory.root_key(settings).sealer(TOKENS), create=False)
            publish(candidate, directory.database_path)
        except OSError as exc:
            raise VaultError(f"cannot restore the vault from {file}: {exc.strerror}") from exc
        finally:
            remove_database(candidate)


def _copy(source: Path, target: Path, doing: str) -> None:
    named = target if doing.endswith("to") else source
    try:
        copy_database(source, target)
    except OSError as exc:
        raise VaultError(f"cannot {doing} {named}: {exc.strerror}") from exc
    except sqlite3.Error as exc:
        raise VaultError(f"cannot {doing} {named}: {exc}") from exc
