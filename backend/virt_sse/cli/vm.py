"""``virt-sse vm``."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import session
from virt_sse.cli.disk_options import DomainName
from virt_sse.cli.output import Output, OutputFormat, human_size, note, print_fields, print_rows, warn
from virt_sse.cli.session import backend
from virt_sse.cli.vm_create import vm_create
from virt_sse.cli.vm_encrypt import vm_encrypt
from virt_sse.cli.vm_inspect import vm_inspect
from virt_sse.cli.vm_save import vm_restore, vm_save
from virt_sse.cli.vm_verify import vm_verify
from virt_sse.errors import InvalidValueError
from virt_sse.model.disks import parse_disk_size
from virt_sse.model.layers import HostCaching

if TYPE_CHECKING:
    from virt_sse.domains.settings import VmView

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command(name="create")(vm_create)
app.command(name="encrypt")(vm_encrypt)
app.command(name="inspect")(vm_inspect)
app.command(name="verify")(vm_verify)
app.command(name="save")(vm_save)
app.command(name="restore")(vm_restore)


_NONE = "none"


class Switch(enum.Enum):
    """On or off."""

    ON = "on"
    OFF = "off"


@app.command(name="list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List all domains and their settings."""
    with backend() as b:
        views = b.vms.all()
    print_rows(
        [_summary(view, output) for view in views],
        ("name", "state", "encryption-at-host", "size", "temp-disk-size", "disks"),
        output,
    )


@app.command()
def show(domain: DomainName, output: Output = OutputFormat.TABLE) -> None:
    """Show a domain's settings, and the protection of all its data at rest on this host."""
    with backend() as b:
        view = b.vms.show(domain)
    _print(view, output)


@app.command()
def update(
    domain: DomainName,
    encryption_at_host: Annotated[
        Switch | None,
        typer.Option("--encryption-at-host", help="Encrypt all data of the domain on this host."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="VM size as in the cloud, e.g. Standard_D2s_v3; or none."),
    ] = None,
    temp_disk_size: Annotated[
        str | None,
        typer.Option(
            "--temp-disk-size", help="Size of a temporary disk, lost at shutdown, e.g. 10G; or none."
        ),
    ] = None,
    disk_caching: Annotated[
        list[str] | None,
        typer.Option(
            "--disk-caching",
            metavar="TARGET=CACHING",
            help="Host caching of a disk: None, ReadOnly or ReadWrite. May be repeated.",
        ),
    ] = None,
    refresh_disks: Annotated[
        bool,
        typer.Option("--refresh-disks", help="Adapt the disks in the definition to a changed placement."),
    ] = False,
    accelerate: Annotated[
        Switch | None,
        typer.Option("--accelerate", help="Encrypt faster: the domain's QEMU preloads virt-sse's library."),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Change the settings of a domain that is shut off; they apply from its next start."""
    from virt_sse.domains.settings import KEEP, VmChanges

    changes = VmChanges(
        encryption_at_host=KEEP if encryption_at_host is None else encryption_at_host is Switch.ON,
        size=KEEP if size is None else None if size == _NONE else size,
        temp_disk_size=KEEP
        if temp_disk_size is None
        else None
        if temp_disk_size == _NONE
        else parse_disk_size(temp_disk_size),
        caching=dict(_caching(each) for each in disk_caching or ()),
        refresh_disks=refresh_disks,
        accelerate=KEEP if accelerate is None else accelerate is Switch.ON,
    )
    if changes == VmChanges():
        raise InvalidValueError("nothing to change", hint="'virt-sse vm update --help' lists the settings")
    with backend() as b:
        view = b.vms.update(domain, changes)
    _print(view, output)


@app.command()
def protect(domain: DomainName) -> None:
    """Keep a domain's definition in the store: another host can take the domain over.

    For hosts that share a store. 'virt-sse host evacuate' on another host starts the domain there after this
    host has died. The agent follows later changes of the domain.
    """
    from virt_sse.domains.protection import DomainProtection

    with session.host() as host:
        DomainProtection(host).protect(domain)
    note(f"protected domain {domain}")


@app.command()
def unprotect(
    domain: Annotated[
        str, typer.Argument(metavar="DOMAIN", help="The domain's name or UUID.", show_default=False)
    ],
) -> None:
    """Remove a domain's definition from the store; libvirt keeps the domain."""
    from virt_sse.domains.protection import DomainProtection

    with session.host() as host:
        DomainProtection(host).unprotect(domain)
    note(f"no longer protected: domain {domain}")


def _caching(text: str) -> tuple[str, HostCaching]:
    target, separator, mode = text.partition("=")
    try:
        if target and separator:
            return target, HostCaching(mode)
    except ValueError:
        pass
    known = ", ".join(each.value for each in HostCaching)
    raise InvalidValueError(f"invalid disk caching {text[:40]!r}", hint=f"e.g. vda=ReadWrite; known: {known}")


def _summary(view: VmView, output: OutputFormat) -> dict[str, object]:
    temp_size = view.properties.temp_disk_size
    return {
        "name": view.name,
        "uuid": str(view.id),
        "state": "running" if view.is_active else "shut off",
        "encryption-at-host": (Switch.ON if view.properties.encryption_at_host else Switch.OFF).value,
        "size": view.properties.size,
        "temp-disk-size": temp_size
        if temp_size is None or output is OutputFormat.JSON
        else human_size(temp_size),
        "disks": len(view.disks),
        "problem": str(view.problem) if view.problem else None,
    }


def _print(view: VmView, output: OutputFormat) -> None:
    """Print a VM. Plaintext of encrypted disks, or with encryption at host, is also a warning."""
    from virt_sse.domains.data_on_host import State
    from virt_sse.domains.guest_preload import library_problem

    fields = _summary(view, output)
    fields["accelerate"] = (Switch.ON if view.is_accelerated else Switch.OFF).value
    fields["library"] = view.library.value if view.library else None
    fields["tpm-key"] = str(view.tpm_key) if view.tpm_key else None
    fields["disks"] = [
        {
            "target": target,
            "name": disk.name,
            "caching": disk.caching.value,
            "encryption-type": disk.encryption_type.value,
        }
        for target, disk in view.disks.items()
    ]
    fields["at-rest"] = [
        {"what": each.name, "state": each.state.value, "where": each.place, "reason": each.reason}
        for each in view.at_rest
    ]
    if output is OutputFormat.JSON:
        print_fields(fields, output)
    else:
        print_fields(fields | {"at-rest": _lines(fields["at-rest"])}, output)
    for each in view.at_rest:
        is_told = view.properties.encryption_at_host or each.is_of_encrypted_disk
        if is_told and each.state is State.PLAINTEXT:
            where = f" at {each.place}" if each.place else ""
            warn(f"{each.name}{where} is not encrypted: {each.reason}")
    if view.library and (problem := library_problem(view.library, is_asked=view.is_accelerated)):
        warn(f"{problem}")


def _lines(items: object) -> list[str]:
    """The data at rest, in aligned lines."""
    assert isinstance(items, Sequence)  # noqa: S101 -- ours
    width = max((len(item["what"]) for item in items), default=0)
    return [
        f"{item['what']:{width}}  {item['state']:9}  {item['where'] or '-'}  ({item['reason']})"
        for item in items
    ]
