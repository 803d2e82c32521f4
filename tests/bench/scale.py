"""Commands for many disks: a listing, and a rotation with nothing to do."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from hosts import private_backend
from measurement import Row, Run, alternate
from virt_sse.errors import LabError
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.layers import EncryptionType

_SET = "web"


def measure(bench: Run) -> Iterator[Row]:
    """Compare many disks with few. The copies have no images: neither command opens an image."""
    few, many = 100, bench.amount(10_000, quick=1_000)
    for command in (["disk", "list", "-o", "json"], ["des", "rotate", _SET, "-o", "json"]):
        name = "-".join(command[:2])
        roots = [_host(bench.scratch / f"{name}-{count}", count) for count in (few, many)]
        small, large = alternate(bench.amount(7, quick=3), *(_command(root, command) for root in roots))
        yield Row(
            f"scale/{name}",
            f"{' '.join(command[:2])}, {many} disks",
            large,
            small,
            f"{few} disks",
            details={"us_per_disk": 1e6 * (large.value - small.value) / (many - few)},
        )


def _host(root: Path, count: int) -> Path:
    """A host with so many disks in a set under the platform's key."""
    with private_backend(root) as backend:
        backend.sets.create(
            _SET,
            provider=PLATFORM_KEY.provider,
            key=PLATFORM_KEY.name,
            encryption_type=EncryptionType.CUSTOMER_KEY,
        )
        disk = backend.disks.create(NewDisk(name="disk", size=1 << 20, encryption_set=_SET))
        _copy(root / "var/lib/virt-sse/store.sqlite", disk, count - 1)
        if len(backend.disks.all()) != count:
            raise LabError(f"the store does not have {count} disks")
    return root


def _copy(store: Path, disk: Disk, count: int) -> None:
    """Copy the rows of a disk, in one transaction."""
    with closing(sqlite3.connect(store)) as database, database:
        database.row_factory = sqlite3.Row
        for table, column in (("disks", "id"), ("wrapped_deks", "disk_id")):
            found = database.execute(f"SELECT * FROM {table} WHERE {column} = ?", (disk.id.hex,))  # noqa: S608
            row = dict(found.fetchone())
            names = {name: f"{row[name]}-%d" for name in ("name", "path") if name in row}
            marks = ", ".join(f":{name}" for name in row)
            database.executemany(
                f"INSERT INTO {table} VALUES ({marks})",  # noqa: S608
                (
                    row
                    | {column: uuid.uuid5(disk.id, str(number)).hex}
                    | {name: text % number for name, text in names.items()}
                    for number in range(count)
                ),
            )


def _command(root: Path, arguments: Sequence[str]) -> Callable[[], object]:
    command = [Path(sys.executable).parent / "virt-sse", *arguments]
    environment = os.environ | {"VIRT_SSE_ROOT": str(root)}
    return lambda: subprocess.run(command, env=environment, capture_output=True, check=True)
