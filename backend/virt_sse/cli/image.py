"""``virt-sse image``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli import completion
from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.disk_fields import dek_fields, disk_fields, image_place, print_disk, shown_size
from virt_sse.cli.disk_options import ImagePath, Pool, Quiesce, des_option
from virt_sse.cli.output import Output, OutputFormat, print_fields, print_rows
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend, listed_disks
from virt_sse.errors import InvalidValueError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME[:VERSION]",
        help="The image; default: its newest version.",
        show_default=False,
        autocompletion=completion.images,
    ),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The image's name.", show_default=False)],
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            help="Make the image of this disk, running or not.",
            show_default=False,
            autocompletion=completion.disks,
        ),
    ] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot",
            help="Make the image of this snapshot.",
            show_default=False,
            autocompletion=completion.snapshots,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Encrypt any image readable by qemu-img.", show_default=False),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option("--version", min=1, help="Default: one more than the newest.", show_default=False),
    ] = None,
    des: Annotated[
        str | None,
        des_option("The disk encryption set; default: the source's, if any."),
    ] = None,
    image_format: Annotated[
        DiskFormat | None,
        typer.Option("--format", help="The image format; default: the source's, of a file qcow2."),
    ] = None,
    path: ImagePath = None,
    pool: Pool = None,
    source_format: Annotated[
        str | None,
        typer.Option("--source-format", help="QEMU's name of the file's format; default: probed."),
    ] = None,
    with_backing: Annotated[
        bool, typer.Option("--with-backing", help="Read the file's backing files, too.")
    ] = False,
    quiesce: Quiesce = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make a version of an image, of a disk, a snapshot or a foreign image."""
    if sum(source is not None for source in (disk, snapshot, file)) != 1:
        raise InvalidValueError("pass one of --disk, --snapshot and --file")
    place = image_place(path, pool)
    with backend() as b, progress_bar("encrypting") as progress:
        if file is not None:
            image = b.images.import_image(
                name,
                file,
                version=version,
                encryption_set=des,
                image_format=image_format or DiskFormat.QCOW2,
                place=place,
                source_format=source_format,
                with_backing=with_backing,
                progress=progress,
            )
        else:
            source = b.snapshots.get(snapshot).id if snapshot is not None else disk
            image = b.images.create(
                name,
                str(source),
                version=version,
                encryption_set=des,
                image_format=image_format,
                place=place,
                quiesce=quiesce,
                progress=progress,
            )
    print_disk(image, output)


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List all versions of all images as stored, without a look at their files."""
    print_rows(
        [disk_fields(image) | {"size": shown_size(image, output)} for image in listed_disks(DiskKind.IMAGE)],
        ("name", "created", "size", "state", "key", "path"),
        output,
    )


@app.command()
def show(name: Name, output: Output = OutputFormat.TABLE) -> None:
    """Show a version of an image: its file, its source, its keys and their states."""
    from virt_sse.disks.stored_images import image_state

    with backend() as b:
        image = b.images.get(name)
        fields = disk_fields(image) | {
            "size": shown_size(image, output),
            "image": image_state(image),
            "clones": [clone.name for clone in b.images.clones(image)],
            "deks": dek_fields(b.host, image),
        }
    print_fields(fields, output)


@app.command(cls=DestructiveCommand)
def delete(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME:VERSION",
            help="The version of the image.",
            show_default=False,
            autocompletion=completion.images,
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Delete all linked clones of the image, too.")
    ] = False,
) -> None:
    """Delete a version of an image for good. Full copies of the image stay."""
    with backend() as b:
        confirm(
            lambda: [f"erase {_named(each)}" for each in b.images.delete(name, dry_run=True, force=force)]
        )
        erased = b.images.delete(name, force=force)
    for each in erased:
        typer.echo(f"erased {_named(each)}")


def _named(erased: Disk) -> str:
    what = "linked clone" if erased.is_linked_clone else "image"
    return f"{what} {erased.name} ({erased.path})"
