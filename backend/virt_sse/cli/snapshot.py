"""``virt-sse snapshot``."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli import completion
from virt_sse.cli.confirmation import DestructiveCommand, confirm, is_dry_run
from virt_sse.cli.disk_fields import (
    dek_fields,
    disk_fields,
    image_place,
    print_copies,
    print_disk,
    print_snapshots,
    shown_size,
)
from virt_sse.cli.disk_options import ImagePath, Incremental, Pool, Quiesce, des_option
from virt_sse.cli.output import Output, OutputFormat, print_fields
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend, host
from virt_sse.errors import InvalidValueError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, check_kind

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[
    str,
    typer.Argument(
        help="The snapshot's name or id.",
        show_default=False,
        autocompletion=completion.snapshots,
    ),
]
Format = Annotated[
    DiskFormat | None, typer.Option("--format", help="The image format; default: the source's.")
]


@app.command()
def create(
    name: Annotated[
        str,
        typer.Argument(
            help="The new snapshot's name; with --domain, followed by '-' and the disk's target.",
            show_default=False,
        ),
    ],
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            help="The disk, by name or id.",
            show_default=False,
            autocompletion=completion.disks,
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            "--domain",
            help="Take all disks of this domain, at one point in time.",
            show_default=False,
            autocompletion=completion.domains,
        ),
    ] = None,
    incremental: Incremental = False,
    quiesce: Quiesce = None,
    image_format: Format = None,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Take a snapshot of a disk or of all disks of a domain, running or not: encrypted copies."""
    if (disk is None) == (domain is None):
        raise InvalidValueError("pass either --disk or --domain")
    place = image_place(path, pool)
    if domain is not None and (place or image_format):
        raise InvalidValueError("--path, --pool and --format go with --disk alone")
    if incremental and image_format is DiskFormat.RAW:
        raise InvalidValueError("incremental snapshots are qcow2 images")
    with (
        backend() as b,
        progress_bar(
            "copying", size=(lambda: b.host.store.get(disk).size) if disk and not incremental else None
        ) as progress,
    ):
        if disk is not None:
            taken = b.snapshots.of_disk(
                name,
                disk,
                image_format=image_format,
                place=place,
                is_incremental=incremental,
                quiesce=quiesce,
                progress=progress,
            )
        else:
            taken = b.snapshots.of_domain(
                name, str(domain), is_incremental=incremental, quiesce=quiesce, progress=progress
            )
    print_snapshots(taken, output)


@app.command(name="list")
def list_(
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            help="Only snapshots of this disk, by name or id.",
            autocompletion=completion.disks,
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List snapshots as stored, without a look at their images."""
    print_copies(DiskKind.SNAPSHOT, disk, output)


@app.command()
def show(name: Name, output: Output = OutputFormat.TABLE) -> None:
    """Show a snapshot: its image, its source, its keys and their states."""
    from virt_sse.disks.stored_images import image_state

    with host() as h:
        snapshot = h.store_reads.get(name)
        check_kind(snapshot, DiskKind.SNAPSHOT)
        fields = disk_fields(snapshot) | {
            "size": shown_size(snapshot, output),
            "image": image_state(snapshot),
            "deks": dek_fields(h, snapshot),
        }
    print_fields(fields, output)


@app.command(cls=DestructiveCommand)
def restore(
    name: Name,
    disk: Annotated[
        str,
        typer.Argument(help="The new disk's name; with --in-place, the snapshot's disk.", show_default=False),
    ],
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Put the content into the snapshot's own disk; its present content is lost."
        ),
    ] = False,
    des: Annotated[
        str | None,
        des_option("The new disk's encryption set; default: the snapshot's."),
    ] = None,
    image_format: Format = None,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a new disk with the content of a snapshot, or put the content back into its disk."""
    if in_place:
        if des or image_format or path or pool:
            raise InvalidValueError("with --in-place, the disk keeps its set, format and path")
        with backend() as b:

            def plan() -> list[str]:
                into = b.restoration.restore(name, disk, progress_bar, dry_run=True)
                return [f"replace the content of disk {into.name} with the content of snapshot {name}"]

            confirm(plan)
            restored = b.restoration.restore(name, disk, progress_bar)
        print_disk(restored, output)
        return
    if is_dry_run():
        raise InvalidValueError("--dry-run goes with --in-place alone")
    with backend() as b, progress_bar("copying", size=lambda: b.host.store.get(name).size) as progress:
        made = b.snapshots.restore(
            name,
            disk,
            encryption_set=des,
            image_format=image_format,
            place=image_place(path, pool),
            progress=progress,
        )
    print_disk(made, output)


@app.command(cls=DestructiveCommand)
def delete(name: Name) -> None:
    """Delete a snapshot for good: wipe its keyslots, forget its DEK, remove its image."""
    with backend() as b:
        confirm(lambda: [f"erase {_named(b.snapshots.delete(name, dry_run=True))}"])
        snapshot = b.snapshots.delete(name)
    typer.echo(f"erased {_named(snapshot)}")


def _named(snapshot: Disk) -> str:
    return f"snapshot {snapshot.name} ({snapshot.path})"
