"""``virt-sse disk xml``, ``attach`` and ``detach``: disks in domains."""

from __future__ import annotations

from typing import Annotated

import typer

from virt_sse.cli.disk_options import DomainName, Name
from virt_sse.cli.output import note
from virt_sse.cli.session import backend
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.layers import HostCaching

Target = Annotated[
    str | None,
    typer.Option("--target", help="The disk's name in the guest; default: the first free name on the bus."),
]
Bus = Annotated[
    DiskBus | None,
    typer.Option("--bus", help="The bus; default: by the target's first letters: virtio, SCSI or IDE."),
]
ReadOnly = Annotated[bool, typer.Option("--read-only", help="The guest cannot write to the disk.")]

_XML_COMMENT = """\
<!-- For the definition of a domain: libvirt gets the disk's key when the domain starts.
     A running domain gets disk and key by 'virt-sse disk attach';
     'virsh attach-device' fails there: "Secret not found". -->
"""


def xml(
    name: Name,
    target: Target = None,
    bus: Bus = None,
    read_only: ReadOnly = False,
    iothread: Annotated[
        int | None,
        typer.Option("--iothread", min=1, help="The iothread of the domain that serves the disk."),
    ] = None,
) -> None:
    """Print the <disk> element for using a disk in a domain."""
    with backend() as b:
        element = b.domains.disk_element(name, target=target, bus=bus, read_only=read_only, iothread=iothread)
    typer.echo(_XML_COMMENT, nl=False)
    typer.echo(element, nl=False)


def attach(
    name: Name,
    domain: DomainName,
    target: Target = None,
    bus: Bus = None,
    read_only: ReadOnly = False,
    caching: Annotated[
        HostCaching,
        typer.Option("--caching", help="Host caching of the disk, in a domain with encryption at host."),
    ] = HostCaching.NONE,
    iothread: Annotated[
        str | None,
        typer.Option(
            "--iothread",
            metavar="N|new|auto",
            help="The domain's iothread that serves the disk. auto: an iothread without a disk, else a new "
            "iothread up to the host's number of processors, else the iothread with the fewest disks.",
        ),
    ] = None,
) -> None:
    """Attach a disk to a domain: in its persistent definition, and at once if the domain runs."""
    from virt_sse.libvirt.iothreads import parse_choice

    chosen = None if iothread is None else parse_choice(iothread)
    with backend() as b:
        target = b.hotplug.attach(
            name, domain, target=target, bus=bus, read_only=read_only, caching=caching, iothread=chosen
        )
        gains = b.hotplug.gains_by_acceleration(domain)
    note(f"attached disk {name} to domain {domain} as {target}")
    if gains:
        note(f"faster from the next start after 'virt-sse vm update {domain} --accelerate on'")


def detach(name: Name, domain: DomainName) -> None:
    """Detach a disk from a domain: from its persistent definition, and at once if the domain runs."""
    with backend() as b:
        b.hotplug.detach(name, domain)
    note(f"detached disk {name} from domain {domain}")
