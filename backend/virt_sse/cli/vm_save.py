"""``virt-sse vm save`` and ``virt-sse vm restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli.output import Output, OutputFormat, print_fields
from virt_sse.cli.session import backend

if TYPE_CHECKING:
    from virt_sse.domains.saved_states import SavedState


def vm_save(
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain's name.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="The new file for the state.", show_default=False)],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Save a running domain's memory into an encrypted file, and end the domain.

    'virsh save' and 'virsh managedsave' write the memory in plaintext. This file is under the keys of the
    domain's disks. A saved state can be restored once, on this host, if the domain was not started meanwhile.
    """
    with backend() as b:
        _print(b.saved_states.save(domain, file), output)


def vm_restore(
    file: Annotated[Path, typer.Argument(help="The file of the saved state.", show_default=False)],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Start a domain where 'vm save' saved it, and remove the file."""
    with backend() as b:
        _print(b.saved_states.restore(file), output)


def _print(saved: SavedState, output: OutputFormat) -> None:
    fields: dict[str, object] = {
        "domain": saved.domain,
        "file": str(saved.path),
        "guest": "running" if saved.is_running else "paused",
        "keys": list(saved.keys),
    }
    print_fields(fields, output)
