"""``virt-sse vm encrypt``."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from virt_sse.cli.disk_options import DomainName, MaxRate, cipher_option, des_option
from virt_sse.cli.disk_reencrypt import pause_of
from virt_sse.cli.output import note, warn
from virt_sse.cli.progress import progress_bar
from virt_sse.cli.session import backend
from virt_sse.errors import InvalidValueError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.sizes import parse_size


def vm_encrypt(
    domain: DomainName,
    des: Annotated[
        str | None,
        des_option("The disk encryption set; default: none, the disks are under the platform's key."),
    ] = None,
    cipher: Annotated[
        Cipher | None,
        cipher_option(
            "--cipher",
            "Cipher of the guest's layer; default: aes-256-xts.",
        ),
    ] = None,
    infrastructure_cipher: Annotated[
        Cipher | None,
        cipher_option(
            "--infrastructure-cipher",
            "Cipher of the second layer, with double encryption; default: the configured cipher.",
        ),
    ] = None,
    image_format: Annotated[
        DiskFormat, typer.Option("--format", help="The format of the new images.")
    ] = DiskFormat.QCOW2,
    directory: Annotated[
        Path | None,
        typer.Option("--directory", help="Folder of the new images; default: that of the plaintext image."),
    ] = None,
    max_rate: MaxRate = None,
    wipe: Annotated[
        bool, typer.Option("--wipe", help="Overwrite and remove the plaintext images once encrypted.")
    ] = False,
) -> None:
    """Encrypt all plaintext disks of a domain in place, also while the domain runs."""
    from virt_sse.replacement.in_place import EncryptionInPlace

    change = EncryptionInPlace(
        cipher=cipher or AES_256_XTS,
        infrastructure_cipher=infrastructure_cipher,
        encryption_set=des,
        format=image_format,
        directory=directory,
        max_rate=parse_size(max_rate) if max_rate else None,
    )
    with backend() as b:
        plain = b.in_place.plain_disks(domain)
        if not plain and not b.in_place.kept_images(domain):
            raise InvalidValueError(f"domain {domain!r} has no plaintext disk")
        for each in plain:
            bar = functools.partial(progress_bar, size=each.size or None)
            done = b.in_place.encrypt(domain, each, change, bar)
            paused = pause_of(done.paused_seconds)
            note(f"encrypted {done.target} as disk {done.disk.name} ({done.disk.path}){paused}")
        kept = b.in_place.kept_images(domain)
        for path in [] if wipe else kept:
            warn(f"{path} still holds the plaintext")
        if wipe or (kept and sys.stdin.isatty() and typer.confirm("overwrite and remove these images?")):
            for wiped in b.in_place.wipe(domain):
                note(f"overwrote and removed {wiped.path}")
                if not wiped.in_place:
                    warn(f"the file system of {wiped.path} may keep the old content")
            warn("flash memory, snapshots and copies of the storage may keep plaintext")
