"""``virt-sse vmss``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.confirmation import DestructiveCommand, confirm
from virt_sse.cli.output import Output, OutputFormat, note, print_fields, print_rows
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend
from virt_sse.cli.vm import Switch
from virt_sse.errors import InvalidValueError

if TYPE_CHECKING:
    from virt_sse.model.scale_sets import ScaleSet

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

SetName = Annotated[str, typer.Argument(metavar="NAME", help="The scale set's name.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Destroy running domains that are to be removed.")]


@app.command()
def create(
    name: SetName,
    definition: Annotated[
        Path,
        typer.Argument(help="Domain XML without disks of virt-sse.", show_default=False),
    ],
    image: Annotated[
        str, typer.Option("--image", help="The disk to copy for each instance.", show_default=False)
    ],
    instances: Annotated[int, typer.Option("--instances", min=0, help="Number of instances.")] = 0,
    at_host: Annotated[
        Switch, typer.Option("--encryption-at-host", help="Encryption at host of new instances.")
    ] = Switch.OFF,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Create a scale set: each instance is a domain NAME-1, NAME-2, … with a copy of a disk."""
    try:
        xml = definition.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidValueError(f"cannot read {definition}: {exc}") from exc
    with backend() as b, progress_bar("creating") as progress:
        made = b.scale_sets.create(
            name,
            xml,
            image,
            size=instances,
            encryption_at_host=at_host is Switch.ON,
            progress=progress,
        )
    print_fields(_fields(made), output)


@app.command(cls=DestructiveCommand)
def scale(
    name: SetName,
    instances: Annotated[
        int | None,
        typer.Argument(help="The new number of instances; default: the number wanted before."),
    ] = None,
    force: Force = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Add or remove instances, the highest numbers first; finishes an interrupted command."""
    with backend() as b:
        new, surplus = b.scale_sets.changes(name, instances, force=force)
        plan = [*(f"make domain {each} and its disk" for each in new), *map(_removal, surplus)]
        confirm(lambda: plan, asks=bool(surplus))
        with progress_bar("scaling") as progress:
            scaled = b.scale_sets.scale(name, instances, force=force, progress=progress)
    print_fields(_fields(scaled), output)


@app.command()
def update(
    name: SetName,
    at_host: Annotated[
        Switch,
        typer.Option("--encryption-at-host", help="Encryption at host of new instances.", show_default=False),
    ],
) -> None:
    """Change the instances made from now on, and name the existing instances that differ."""
    with backend() as b:
        differing = b.scale_sets.update(name, encryption_at_host=at_host is Switch.ON)
    how = "without" if at_host is Switch.ON else "with"
    note(f"new instances of {name}: encryption at host {at_host.value}")
    for each in differing:
        note(f"existing instance {how} encryption at host: {each}")


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List all scale sets as wanted, without a look at their domains."""
    with backend() as b:
        rows = [_fields(each) for each in b.scale_sets.all()]
    print_rows(rows, ("name", "instances", "encryption-at-host", "state"), output)


@app.command()
def show(name: SetName, output: Output = OutputFormat.TABLE) -> None:
    """Show a scale set's instances and the state of their domains."""
    with backend() as b:
        views = b.scale_sets.instances(name)
    rows = [
        {
            "name": view.name,
            "state": ("running" if view.is_active else "shut off") if view.is_defined else "missing",
            "encryption-at-host": view.encryption_at_host,
            "domain": str(view.instance.domain_id),
            "disk": str(view.instance.disk_id),
        }
        for view in views
    ]
    print_rows(rows, ("name", "state", "encryption-at-host", "domain", "disk"), output)


@app.command(cls=DestructiveCommand)
def delete(name: SetName, force: Force = False) -> None:
    """Delete a scale set with its domains and their disks, for good; the copied disk stays."""
    with backend() as b:
        confirm(
            lambda: [*map(_removal, b.scale_sets.removals(name, force=force)), f"delete scale set {name}"]
        )
        with progress_bar("deleting") as progress:
            b.scale_sets.delete(name, force=force, progress=progress)
    note(f"deleted scale set {name}")


def _removal(instance: str) -> str:
    return f"remove domain {instance} and erase its disk"


def _fields(scale_set: ScaleSet) -> dict[str, object]:
    return {
        "name": scale_set.name,
        "instances": scale_set.size,
        "encryption-at-host": scale_set.encryption_at_host,
        "image": str(scale_set.image_id),
        "state": "deleting" if scale_set.is_deleting else "ready",
        "created": scale_set.created.isoformat(),
    }
