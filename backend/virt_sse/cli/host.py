"""``virt-sse host``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from virt_sse.cli import host_hsm, session, shell_files
from virt_sse.cli.confirmation import DestructiveCommand, confirm, is_dry_run
from virt_sse.cli.output import Output, OutputFormat, note, print_rows, warn
from virt_sse.cli.session import backend
from virt_sse.errors import ConfigError

if TYPE_CHECKING:
    from virt_sse.keys.host import Host
    from virt_sse.model.hosts import HostRecord
    from virt_sse.model.protected_domains import ProtectedDomain

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(host_hsm.app, name="hsm")


_WOULD_BE = {
    "nothing": "would be taken over",
    "define": "would be defined",
    "start": "would be started",
}


@app.callback()
def _group() -> None:
    """A callback keeps ``host`` a group of commands."""


@app.command()
def init(
    accelerate: Annotated[
        bool | None,
        typer.Option(
            "--accelerate/--no-accelerate",
            help="Install, or remove, the library that lets guests' QEMU processes encrypt faster.",
        ),
    ] = None,
) -> None:
    """Create the platform keyring, the libvirt hook and this host's other files, unless they exist.

    Among them are man pages and the completion of bash, zsh and fish, in /usr/local/share.

    With --accelerate, measure whether QEMU encrypts faster with virt-sse's library. If so, copy the library
    into QEMU's own folder, where AppArmor lets QEMU load libraries; 'vm update DOMAIN --accelerate on' makes
    a domain's QEMU load the copy. A library sees the keys in QEMU's memory: root alone may change the copy,
    and no domain starts with another library under this name.
    """
    from virt_sse.host.guest_acceleration import accelerate_guests, stop_acceleration
    from virt_sse.host.setup import initialise

    with backend() as b:
        changed = None
        if accelerate is not None:
            changed = (accelerate_guests if accelerate else stop_acceleration)(b.host.config)
        made = initialise(b.host)
        try:
            made += shell_files.install(b.host.config.root)
        except ConfigError as exc:  # e.g. a read-only /usr: the host works without these files
            warn(str(exc))
    for thing in made:
        note(f"made {thing}")
    if any("hook" in thing for thing in made):
        note("restart libvirtd (or virtqemud): the daemon looks for hooks only when it starts")
    if changed:
        note(changed)
    elif not made:
        note("nothing to do")


@app.command("list")
def list_(output: Output = OutputFormat.TABLE) -> None:
    """List the hosts that share the store, with the number of disks and VMs that each alone may use."""
    with session.host() as host:
        rows = [
            {
                "name": each.name,
                "id": str(each.id),
                "state": each.state.value,
                "seen": f"{each.silent_seconds} s ago",
                "leases": each.leases,
                "this": "yes" if each.id == host.leases.identity.id else "no",
            }
            for each in host.leases.hosts()
        ]
    print_rows(rows, ["name", "id", "state", "seen", "leases", "this"], output)


@app.command(cls=DestructiveCommand)
def fence(
    name: Annotated[str, typer.Argument(help="Name or id of the host.", show_default=False)],
) -> None:
    """State that another host is off for certain: other hosts may use its disks from then on.

    The statement is in the audit log. A host seen within the last minute is refused. If the machine is not
    off, two guests may write to one disk. The fenced host is a member again once its machine was restarted.
    """
    with session.host() as host:
        note(_fenced(host, host.store.hosts.get(name)))


def _fenced(host: Host, other: HostRecord) -> str:
    """Fence a host, once the user has agreed: what was done."""
    from virt_sse.host.fencing import fence as take_leases
    from virt_sse.host.fencing import refuse_fencing

    def plan() -> list[str]:
        refuse_fencing(host, other)
        return [f"fence host {other.name} ({other.id}), whose machine is off for certain"]

    confirm(plan, always=True)
    count = take_leases(host, other)
    return f"fenced host {other.name}: {count} leases taken back"


@app.command(cls=DestructiveCommand)
def evacuate(
    name: Annotated[str, typer.Argument(help="Name or id of the host.", show_default=False)],
    output: Output = OutputFormat.TABLE,
) -> None:
    """Take over the protected domains of another host that is off for certain, and start those that ran.

    A host not yet fenced is fenced first, as by 'virt-sse host fence'. Domains that cannot start here are
    left to other hosts; the exit status is 1 then. After an interruption, run the command again.
    """
    from virt_sse.domains.evacuation import Evacuated, Evacuator, TakeoverResult
    from virt_sse.host.fencing import refuse_fencing

    rows: list[dict[str, object]] = []

    def report(each: Evacuated) -> None:
        reason = str(each.reason) if each.reason else None
        rows.append(_evacuated(each.domain, each.result.value) | {"reason": reason})

    with session.host() as host:
        other, evacuator = host.store.hosts.get(name), Evacuator(host)
        if is_dry_run():
            if not other.is_fenced:
                refuse_fencing(host, other)
            rows = [_evacuated(each, _WOULD_BE[each.evacuation.value]) for each in evacuator.due(other)]
        else:
            if not other.is_fenced:
                note(_fenced(host, other), err=True)
            evacuator.evacuate(host.store.hosts.get(str(other.id)), report)
    print_rows(rows, ["domain", "id", "result", "reason"], output)
    if any(row["result"] == TakeoverResult.FAILED.value for row in rows):
        raise typer.Exit(1)


def _evacuated(domain: ProtectedDomain, result: str) -> dict[str, object]:
    return {"domain": domain.name, "id": str(domain.id), "result": result, "reason": None}


@app.command()
def doctor(output: Output = OutputFormat.TABLE) -> None:
    """Find faults of this host, and say what to do about each. Changes nothing.

    The exit status is 0 without a fault, 1 with an error, and 3 with warnings alone.
    """
    from virt_sse.audit.record import Component
    from virt_sse.host.doctor import examine
    from virt_sse.host.fault import Severity
    from virt_sse.keys.host import Host

    # Without the backend, which finishes the work of killed commands.
    opened = Host.open(session.config(), session.plugins(), component=Component.HOST)
    with contextlib.closing(opened):
        found = examine(opened)
    fields = ["id", "severity", "part", "problem", "remedy"]
    if found or output is OutputFormat.JSON:
        rows = [
            {
                "id": each.id,
                "severity": each.severity.value,
                "part": each.part,
                "problem": each.problem,
                "remedy": each.remedy,
            }
            for each in found
        ]
        print_rows(rows, fields, output)
    else:
        note("no faults found")
    if found:
        raise typer.Exit(1 if any(each.severity is Severity.ERROR for each in found) else 3)


@app.command(cls=DestructiveCommand)
def uninstall(
    keep_disks: Annotated[
        bool, typer.Option("--keep-disks", help="Uninstall although disks exist; images and keys stay.")
    ] = False,
) -> None:
    """Remove hook, units, AppArmor rule, guests' library, completion and man pages from this host.

    Keys, images, the store, logs and the configuration stay, and so do the hooks of others. Refused while
    domains with disks of virt-sse run, while the agent runs, and while disks exist, unless with --keep-disks.
    After a kill, run the command again. To remove virt-sse itself: pip uninstall virt-sse.
    """
    from virt_sse.agent.systemd import installed_units
    from virt_sse.cli import shell_files
    from virt_sse.errors import ConfigError
    from virt_sse.host.uninstall import InstalledPart, installed_parts, refuse_if_needed, remaining

    with session.host() as host:
        refuse_if_needed(host, keep_disks=keep_disks)
        units = [InstalledPart(f"unit {each}", each.unlink) for each in installed_units(host.config)]
        files = [InstalledPart(str(path), path.unlink) for path in shell_files.installed(host.config.root)]
        parts = [*units, *files, *installed_parts(host.config)]
        removals = [f"remove {part.what}" for part in parts]
        confirm(lambda: [*removals, *(f"keep {what}" for what in remaining(host))], asks=bool(parts))
        for part in parts:
            try:
                part.remove()
            except OSError as exc:
                raise ConfigError(f"cannot remove {part.what}: {exc.strerror}") from exc
            typer.echo(f"removed {part.what}")
        if not parts:
            typer.echo("nothing to remove")
        for what in remaining(host):
            typer.echo(f"kept {what}")


@app.command()
def capabilities(output: Output = OutputFormat.TABLE) -> None:
    """Show the capabilities of this host: ciphers, double encryption, host caches, …"""
    from virt_sse.config import Config
    from virt_sse.host.capabilities import probe

    rows = [
        {"capability": each.name, "available": each.available, "detail": each.detail}
        for each in probe(Config.load())
    ]
    print_rows(rows, ["capability", "available", "detail"], output)
