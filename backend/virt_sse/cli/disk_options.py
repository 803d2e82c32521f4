"""Options that several commands for disks and copies of disks have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from virt_sse.cli import completion
from virt_sse.model.ciphers import Cipher


def cipher_option(name: str, text: str) -> Any:
    """The option *name* for a cipher."""
    return typer.Option(name, parser=Cipher.parse, metavar="CIPHER", help=text)


def des_option(text: str) -> Any:
    """The option ``--des`` for a disk encryption set."""
    return typer.Option(
        "--des",
        help=text,
        autocompletion=completion.encryption_sets,
    )


ImagePath = Annotated[
    Path | None,
    typer.Option(
        "--path",
        help="The image to create, a file, block device or rbd:POOL/IMAGE; default: NAME.FORMAT in libvirt's"
        " image folder.",
    ),
]
Pool = Annotated[
    str | None,
    typer.Option(
        "--pool", help="The libvirt storage pool (of type dir, fs or netfs) to create the image in."
    ),
]
Quiesce = Annotated[
    bool | None,
    typer.Option(
        "--quiesce/--no-quiesce",
        help="Freeze the guest's file systems; default: if a guest agent is connected.",
        show_default=False,
    ),
]
Incremental = Annotated[
    bool,
    typer.Option(
        "--incremental", help="Store only what changed since the copy before; the first copy is a full one."
    ),
]
MaxRate = Annotated[
    str | None,
    typer.Option("--max-rate", metavar="SIZE", help="Copy at most this many bytes a second, e.g. 100M."),
]
Name = Annotated[
    str,
    typer.Argument(
        help="The disk's name or id.",
        show_default=False,
        autocompletion=completion.disks,
    ),
]
DomainName = Annotated[
    str,
    typer.Argument(
        metavar="DOMAIN",
        help="The domain's name.",
        show_default=False,
        autocompletion=completion.domains,
    ),
]
