"""``virt-sse disk reencrypt``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli.disk_options import MaxRate, Name, cipher_option, des_option
from virt_sse.cli.output import note
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend, config
from virt_sse.errors import InvalidValueError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.sizes import parse_size


def disk_reencrypt(
    name: Name,
    cipher: Annotated[
        Cipher | None,
        cipher_option(
            "--cipher",
            "Cipher of the guest's layer; default: unchanged.",
        ),
    ] = None,
    infrastructure_cipher: Annotated[
        Cipher | None,
        cipher_option(
            "--infrastructure-cipher",
            "Cipher of the second layer, in a set for double encryption; default: unchanged.",
        ),
    ] = None,
    des: Annotated[
        str | None,
        des_option("The disk encryption set of the re-encrypted disk; default: unchanged."),
    ] = None,
    image_format: Annotated[
        DiskFormat | None, typer.Option("--format", help="The image format; default: unchanged.")
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--path",
            help="The new image file; default: the present path, or a new name beside a running guest's.",
        ),
    ] = None,
    max_rate: MaxRate = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the agent does the copying.")
    ] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Undo a re-encryption that is under way.")] = False,
) -> None:
    """Give a disk new DEKs and a new volume key, also while a domain uses the disk."""
    from virt_sse.agent_client import ask
    from virt_sse.replacement.reencryption import Reencryption

    change = Reencryption(
        cipher=cipher,
        infrastructure_cipher=infrastructure_cipher,
        encryption_set=des,
        format=image_format,
        path=path,
        max_rate=parse_size(max_rate) if max_rate else None,
    )
    if cancel:
        if change != Reencryption() or detach:
            raise InvalidValueError("--cancel excludes all other options")
        with backend() as b:
            disk = b.reencryption.cancel(name)
        note(f"disk {disk.name} is as before")
    elif detach:
        ask(config().agent_socket, "GET", "/status", timeout=config().agent.timeout)
        with backend() as b:
            disk = b.reencryption.start_detached(name, change)
        note(f"the agent re-encrypts disk {disk.name}")
    else:
        with backend() as b:
            size = b.disks.get(name).size
            done = b.reencryption.reencrypt(name, change, functools.partial(progress_bar, size=size))
        note(f"re-encrypted disk {done.disk.name} ({done.disk.path}){pause_of(done.paused_seconds)}")


def pause_of(seconds: float | None) -> str:
    """The pause of a guest, for messages; empty without a running guest."""
    return "" if seconds is None else f"; the guest was paused for {seconds * 1000:.0f} ms"
