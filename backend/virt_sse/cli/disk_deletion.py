"""``virt-sse disk delete``, ``recover`` and ``purge``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import completion
from virt_sse.cli.certificate_file import refuse_taken, write_certificate
from virt_sse.cli.confirmation import confirm
from virt_sse.cli.disk_fields import print_disk
from virt_sse.cli.disk_options import Name
from virt_sse.cli.output import Output, OutputFormat, note
from virt_sse.cli.session import backend
from virt_sse.errors import InvalidValueError, VirtSseError
from virt_sse.model.disks import Disk

if TYPE_CHECKING:
    from virt_sse.backend import Backend

_Certificate = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        help="Write a signed certificate of the deletion to this new file.",
        show_default=False,
    ),
]
_DeletedName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The deleted disk's name or id.",
        show_default=False,
        autocompletion=completion.deleted_disks,
    ),
]


def delete(
    name: Name,
    purge: Annotated[bool, typer.Option("--purge", help="Delete the disk for good, at once.")] = False,
    certificate: _Certificate = None,
) -> None:
    """Delete a disk: recoverable for the retention time, then purged. Its name stays taken until then."""
    with backend() as b:
        is_for_good = purge or not b.soft_deletion.retention
        if certificate is not None and not is_for_good:
            raise InvalidValueError(
                "a certificate is about a disk that is deleted for good",
                hint="pass --purge, or pass --certificate to 'virt-sse disk purge' later",
            )
        if is_for_good:
            _erase(b, functools.partial(b.disks.delete, name), certificate)
            return
        confirm(lambda: [_deletion(b.soft_deletion.delete(name, dry_run=True))])
        disk = b.soft_deletion.delete(name)
    if disk.scheduled_purge:
        note(f"deleted disk {disk.name}; it will be purged on {disk.scheduled_purge:%Y-%m-%d}")
    else:
        typer.echo(_erased(disk))


def recover(name: _DeletedName, output: Output = OutputFormat.TABLE) -> None:
    """Recover a deleted disk, if its key can still be used."""
    with backend() as b:
        disk = b.soft_deletion.recover(name)
    print_disk(disk, output)


def purge(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The deleted disk's name or id.", show_default=False, autocompletion=completion.deleted_disks
        ),
    ] = None,
    due: Annotated[
        bool, typer.Option("--due", help="Purge all deleted disks whose retention time is over.")
    ] = False,
    certificate: _Certificate = None,
) -> None:
    """Destroy a deleted disk for good: wipe its keyslots, forget its DEK, remove its image.

    The agent does so once the retention time is over; --due does the same on a host without the agent.
    """
    if (name is None) is not due:
        raise InvalidValueError("purging takes either a disk or --due")
    if name is None:
        if certificate is not None:
            raise InvalidValueError("with --due, 'virt-sse certificate show NAME' has the certificates")
        _purge_due()
        return
    with backend() as b:
        _erase(b, functools.partial(b.soft_deletion.purge, name), certificate)


def _purge_due() -> None:
    with backend() as b:
        confirm(lambda: [_erasure(disk) for disk in b.soft_deletion.due()])
        done, failed = b.soft_deletion.purge_due()
    for disk in done:
        typer.echo(_erased(disk))
    for each, reason in failed.items():
        typer.echo(f"virt-sse: disk {each}: {reason}", err=True)
    if failed:
        raise VirtSseError(f"{len(failed)} deleted disks cannot be purged")


def _erase(opened: Backend, erase: Callable[..., Disk], certificate: Path | None) -> None:
    """Erase a disk for good, with a certificate if there is a path for one.

    :param erase: takes *dry_run* and *certified*.
    """
    if certificate is not None:
        refuse_taken(certificate)
    confirm(lambda: [_erasure(erase(dry_run=True))])
    disk = erase(certified=certificate is not None)
    if certificate is not None:
        write_certificate(certificate, opened.certificates.get(str(disk.id)).encode(), disk)
    typer.echo(_erased(disk))


def _erased(disk: Disk) -> str:
    return f"erased disk {disk.name} ({disk.path})"


def _erasure(disk: Disk) -> str:
    return f"erase disk {disk.name} ({disk.path}) for good"


def _deletion(disk: Disk) -> str:
    if disk.scheduled_purge is None:
        return _erasure(disk)
    return f"delete disk {disk.name} ({disk.path}), recoverable until {disk.scheduled_purge:%Y-%m-%d}"
