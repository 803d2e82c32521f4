"""A store in SQLite serves one machine: without leases, two machines could run guests on one disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, StoreError
from virt_sse.system.database_url import sqlite_path
from virt_sse.system.files import write_new

_SUFFIX = ".machine"


def refuse_other_machine(config: Config) -> None:
    """Refuse an SQLite store on whose disks another machine runs domains; the first machine is noted.

    A file beside the database has the machine's id, hashed as machine-id(5) asks for. Machines without an id
    are not told apart.

    :raise DiskInUseError: When another machine is noted.
    :raise StoreError: When the note cannot be read or written.
    """
    database = sqlite_path(config.store_url)
    if database is None or not (ours := _machine(config.root / "etc/machine-id")):
        return
    path = database.with_name(database.name + _SUFFIX)
    try:
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # of two machines, one makes the file
                write_new(path, f"{ours}\n{os.uname().nodename}\n".encode())
        digest, _, name = path.read_text("utf-8").partition("\n")
    except (OSError, ValueError) as exc:
        raise StoreError(f"cannot note in {path} which machine has the store: {exc}") from exc
    if digest != ours:
        raise DiskInUseError(
            f"the store {database} belongs to the machine {name.strip()!r}",
            hint="machines share a store in PostgreSQL alone ('virt-sse store migrate'); "
            f"if that machine does not exist any more, remove {path}",
        )


def _machine(path: Path) -> str | None:
    """The hashed id of this machine; ``None`` without an id."""
    try:
        machine_id = path.read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    is_id = len(machine_id) == 32 and not set(machine_id) - set("0123456789abcdef")
    return hashlib.sha256(f"virt-sse store {machine_id}".encode()).hexdigest() if is_id else None
