"""``virt-sse vm create``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from virt_sse.cli.disk_fields import image_place
from virt_sse.cli.output import note
from virt_sse.cli.session import backend
from virt_sse.errors import InvalidValueError
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import DiskSku, NewDisk, parse_disk_size
from virt_sse.model.layers import HostCaching

if TYPE_CHECKING:
    from enum import Enum

    from virt_sse.domains.new_domains import DomainDiskChoice

    E = TypeVar("E", bound=Enum)

_NEW = "new:"
_OF_DOMAIN = frozenset({"target", "bus", "caching", "readonly"})
_OF_NEW_DISK = frozenset({"size", "des", "format", "sku", "path", "pool"})


def vm_create(
    definition: Annotated[
        str,
        typer.Argument(
            metavar="DEFINITION",
            help="File with the domain's XML, e.g. from 'virt-install --disk none --print-xml'; - for "
            "standard input.",
            show_default=False,
        ),
    ],
    disk: Annotated[
        list[str] | None,
        typer.Option(
            "--disk",
            metavar="DISK[,OPTION=VALUE]",
            help="A disk by its name, or new:NAME,size=SIZE for a new disk. Options: target, bus, caching, "
            "readonly=yes; of a new disk also des, format, sku, path, pool. May be repeated.",
        ),
    ] = None,
    encryption_at_host: Annotated[
        bool, typer.Option("--encryption-at-host", help="Encrypt all data of the domain on this host.")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="Start the domain.")] = False,
    print_xml: Annotated[
        bool,
        typer.Option("--print-xml", help="Print the definition with the disks; define and change nothing."),
    ] = False,
) -> None:
    """Define a domain with disks of virt-sse; after an error, neither the domain nor a new disk is left."""
    choices = [_choice(text) for text in disk or ()]
    if print_xml and (encryption_at_host or start):
        raise InvalidValueError("--print-xml goes with neither --encryption-at-host nor --start")
    xml = _read(definition)
    with backend() as b:
        if print_xml:
            typer.echo(b.new_domains.definition(xml, choices))
            return
        name = b.new_domains.create(xml, choices, encryption_at_host=encryption_at_host, start=start)
    note(f"{'started' if start else 'defined'} domain {name}")


def _read(definition: str) -> str:
    try:
        xml = sys.stdin.read() if definition == "-" else Path(definition).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidValueError(f"cannot read {definition}: {exc}") from exc
    if xml.count("</domain>") > 1:
        raise InvalidValueError(
            f"{definition} has several definitions", hint="virt-install prints one with '--import'"
        )
    return xml


def _choice(text: str) -> DomainDiskChoice:
    """Read a value of ``--disk``."""
    from virt_sse.domains.new_domains import DomainDiskChoice

    name, *rest = text.split(",")
    is_new = name.startswith(_NEW)
    known = _OF_DOMAIN | _OF_NEW_DISK if is_new else _OF_DOMAIN
    options: dict[str, str] = {}
    for each in rest:
        key, _, value = each.partition("=")
        if key not in known or key in options or not value:
            raise InvalidValueError(
                f"invalid option {each[:40]!r} of --disk {name[:40]}",
                hint=f"each at most once, with a value: {', '.join(sorted(known))}",
            )
        options[key] = value
    if options.get("readonly", "yes") != "yes":
        raise InvalidValueError(f"invalid readonly={options['readonly'][:20]!r}", hint="readonly=yes")
    return DomainDiskChoice(
        _new_disk(name.removeprefix(_NEW), options) if is_new else name,
        target=options.get("target"),
        bus=_one_of(DiskBus, options["bus"]) if "bus" in options else None,
        read_only="readonly" in options,
        caching=_one_of(HostCaching, options.get("caching", HostCaching.NONE.value)),
    )


def _new_disk(name: str, options: dict[str, str]) -> NewDisk:
    if "size" not in options:
        raise InvalidValueError(f"no size for disk {name[:80]!r}", hint=f"--disk {_NEW}{name[:80]},size=10G")
    path = options.get("path")
    return NewDisk(
        name=name,
        size=parse_disk_size(options["size"]),
        format=_one_of(DiskFormat, options.get("format", DiskFormat.QCOW2.value)),
        sku=_one_of(DiskSku, options.get("sku", DiskSku.PREMIUM_SSD.value)),
        encryption_set=options.get("des"),
        place=image_place(Path(path) if path else None, options.get("pool")),
    )


def _one_of(kind: type[E], text: str) -> E:
    try:
        return kind(text)
    except ValueError as exc:
        known = ", ".join(str(each.value) for each in kind)
        raise InvalidValueError(f"invalid value {text[:40]!r} in --disk", hint=f"known: {known}") from exc
