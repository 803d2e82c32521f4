"""``virt-sse disk backup`` and the commands for restore points."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import completion
from virt_sse.cli.confirmation import confirm
from virt_sse.cli.disk_fields import image_place, print_backup, print_copies, print_disk
from virt_sse.cli.disk_options import ImagePath, Incremental, Name, Pool, Quiesce, des_option
from virt_sse.cli.output import Output, OutputFormat, note
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk

_Point = Annotated[
    str,
    typer.Argument(
        metavar="POINT",
        help="The restore point: its name, its id, or its image.",
        show_default=False,
        autocompletion=completion.restore_points,
    ),
]


def backup(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(help="The folder for the image and its manifest.", show_default=False)
    ],
    des: Annotated[
        str | None,
        des_option("Any disk encryption set; default: the disk's."),
    ] = None,
    incremental: Incremental = False,
    quiesce: Quiesce = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a restore point of a disk, running or not: an encrypted copy elsewhere."""
    with (
        backend() as b,
        progress_bar(
            "copying", size=None if incremental else lambda: b.host.store.get(name).size
        ) as progress,
    ):
        made = b.restore_points.create(
            name,
            folder,
            encryption_set=des,
            is_incremental=incremental,
            quiesce=quiesce,
            progress=progress,
        )
    print_backup(made, output)


def backups(
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            help="Only restore points of this disk, by name or id.",
            autocompletion=completion.disks,
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List restore points as stored, without a look at their images."""
    print_copies(DiskKind.RESTORE_POINT, disk, output)


def restore(
    point: _Point,
    name: Annotated[str, typer.Argument(help="The new disk's name.", show_default=False)],
    des: Annotated[
        str | None,
        des_option(
            "The new disk's encryption set, with access to the key of a restore point of another host; "
            "default: the restore point's."
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Take a restore point of another host; noted in the audit log."),
    ] = False,
    image_format: Annotated[
        DiskFormat | None,
        typer.Option("--format", help="The image format; default: the restore point's."),
    ] = None,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Verify a restore point, and make a new disk with its content."""
    with backend() as b, progress_bar("copying", size=lambda: b.host.store.get(name).size) as progress:
        disk = b.restore_points.restore(
            point,
            name,
            encryption_set=des,
            trust=trust,
            image_format=image_format,
            place=image_place(path, pool),
            progress=progress,
        )
    print_disk(disk, output)


def verify_backup(point: _Point) -> None:
    """Check a restore point against its manifest: checksum and authentication."""
    with backend() as b:
        found = b.restore_points.verify(point)
    note(f"restore point {found.name}: ok")


def erase_backup(point: _Point) -> None:
    """Crypto-erase a restore point alone: wipe its keyslots, forget its DEK, remove image and manifest."""
    with backend() as b:
        confirm(lambda: [f"erase {_named(b.restore_points.erase(point, dry_run=True))}"])
        found = b.restore_points.erase(point)
    typer.echo(f"erased {_named(found)}")


def _named(point: Disk) -> str:
    return f"restore point {point.name} ({point.path})"
