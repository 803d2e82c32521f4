"""``virt-sse disk receive``."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli.disk_fields import image_place, print_disk
from virt_sse.cli.disk_options import ImagePath, Name, Pool
from virt_sse.cli.output import Output, OutputFormat, note
from virt_sse.cli.session import backend


def receive(
    name: Name,
    new_name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="The new disk's name; default: NAME, a dot, and this host's name.",
            show_default=False,
        ),
    ] = None,
    path: ImagePath = None,
    pool: Pool = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Prepare a disk on this host for the content of another host's disk: migration without shared storage.

    For hosts that share a store. Run the command on the destination, once for each disk of the domain, then
    'virsh migrate --live --copy-storage-all --tls' on the source. The new disk has keys of its own, and is
    the domain's disk after the migration. The other disk stays on the source, for 'virt-sse disk delete'.
    After a failed migration, the next one uses the new disk again.
    """
    with backend() as b:
        disk = b.receiving.prepare(name, new_name=new_name, place=image_place(path, pool))
    print_disk(disk, output)
    note("migrate the domain with --copy-storage-all; then delete the disk that stays on the source")
